-- The tokens of a document, with what the model expected there.
--
-- The columns after is_plain say how the model met this token: expected was its likeliest one, with that probability;
-- probability is the token's own, surprise its -log2 in bits. NULL on a sequence's first token.
-- :doc  doc  the document
WITH place AS (
    SELECT row, seq, pos, token_id, token, role, char_start, char_end,
           NOT (is_special OR is_template OR is_repeat) AS is_plain
    FROM tokens WHERE doc = $doc
)
SELECT t.seq, t.pos, t.row, t.token, t.token_id, t.role, t.char_start, t.char_end, t.is_plain, v.token AS expected,
       p.top1_prob AS expected_probability, exp(p.target_logprob) AS probability, -p.target_logprob / ln(2) AS surprise,
       p.entropy
FROM place t
LEFT JOIN place b ON b.seq = t.seq AND b.pos = t.pos - 1
LEFT JOIN predictions p ON p.row = b.row
LEFT JOIN vocabulary v ON v.token_id = p.top1_id
ORDER BY t.row;
