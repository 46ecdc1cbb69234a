-- The tokens of a document, each with what the model expected in its place.
--
-- surprise is the negative log-probability of the token, in nats, given those before it in its sequence; expected is
-- what the model thought likeliest there, with its probability, and entropy how open it was, in nats. NULL on the first
-- row of a sequence, and where predictions were not stored.
-- :doc  doc             the document
-- :seq  integer = null  one sequence of the document only
WITH place AS (
    SELECT row, seq, pos, token, role, is_special, is_template, is_repeat FROM tokens
    WHERE doc = $doc AND CASE
        WHEN $seq IS NULL OR seq = $seq THEN true
        WHEN $seq NOT IN (SELECT seq FROM sequences WHERE doc = $doc)
        THEN error('document ' || $doc || ' has no sequence ' || $seq)::BOOLEAN
        ELSE false
    END
),
foreseen AS (
    -- A prediction stands on the row before the token that came.
    SELECT t.row, p.target_logprob, p.top1_id, p.top1_prob, p.entropy
    FROM place t JOIN predictions p ON p.row = t.row - 1
    WHERE p.target_id IS NOT NULL
)
SELECT p.seq, p.pos, p.row, p.token, -f.target_logprob AS surprise, v.token AS expected,
       f.top1_prob AS expected_probability, f.entropy, p.role, p.is_special, p.is_template, p.is_repeat
FROM place p LEFT JOIN foreseen f USING (row) LEFT JOIN vocabulary v ON v.token_id = f.top1_id
ORDER BY p.row;
