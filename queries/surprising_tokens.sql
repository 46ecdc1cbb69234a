-- The tokens that the model expected least.
--
-- surprise is the negative log-probability of the token that really came, in nats; expected is what the model thought
-- likelier, with its probability. Without a document, those of the whole store. Special, template and repeated tokens
-- are left out; one that follows a repeated token is not.
-- :doc  doc = null      one document only
-- :k    count = 20      how many
-- :needs  predictions  extract without --no-predictions
WITH worst AS (
    -- A prediction stands on the row before the token that came; its row alone on one side lets DuckDB skip the others.
    SELECT t.row, p.target_logprob, p.target_id, p.top1_id, p.top1_prob, t.doc, t.pos
    FROM predictions p JOIN tokens t ON p.row = t.row - 1
    WHERE p.target_id IS NOT NULL AND NOT (t.is_special OR t.is_template OR t.is_repeat)
      AND ($doc IS NULL OR t.doc = $doc)
    ORDER BY p.target_logprob, p.row LIMIT $k
)
SELECT -w.target_logprob AS surprise, came.token AS token, expected.token AS expected,
       w.top1_prob AS expected_probability, snippet(w.row, 12, 3) AS example, w.doc, w.pos, w.row
FROM worst w
JOIN vocabulary came ON came.token_id = w.target_id
JOIN vocabulary expected ON expected.token_id = w.top1_id
ORDER BY w.target_logprob, w.row;
