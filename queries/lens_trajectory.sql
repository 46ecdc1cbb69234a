-- How the prediction of each token of a document forms, layer by layer.
--
-- target_rank and target_probability are those of the token that really follows; entropy and kl_to_final are in nats;
-- leads_from is the first layer from which on, site after site, the model's final answer stays on top.
-- :doc   doc              the document
-- :lens  text = logit     which lens: logit, or the name of a tuned one that was saved
-- :needs  lens_summary  extract with --lens 5, or: actstore save-lens STORE
-- :needs  predictions   extract without --no-predictions
WITH place AS (
    SELECT t.row, t.seq, t.pos, t.token, p.top1_id, v.token AS final_token
    FROM tokens t JOIN predictions p USING (row) JOIN vocabulary v ON v.token_id = p.top1_id
    WHERE t.doc = $doc AND CASE
        WHEN EXISTS (SELECT 1 FROM lens_summary WHERE lens = $lens) THEN true
        ELSE error('No read-outs of the lens ' || $lens || ' are stored; the query contents lists what is')::BOOLEAN
    END
),
layers AS (
    SELECT l.row, l.site, CAST(split_part(l.site, '.', 2) AS INTEGER) AS layer, l.target_rank, l.target_logprob,
           l.entropy, l.kl_to_final, k.token_id AS top_id,
           3 * layer + list_position(['resid_pre', 'resid_mid', 'resid_post'], split_part(l.site, '.', 1)) AS depth
    FROM lens_summary l JOIN lens_tokens k USING (lens, site, row)
    WHERE l.lens = $lens AND k.rank = 1 AND l.row IN (SELECT row FROM place)
),
last_wrong AS (
    SELECT y.row, max(y.depth) AS depth
    FROM layers y JOIN place p USING (row)
    WHERE y.top_id <> p.top1_id
    GROUP BY y.row
),
leads AS (
    SELECT y.row, min(y.layer) AS leads_from
    FROM layers y LEFT JOIN last_wrong w USING (row)
    WHERE w.depth IS NULL OR y.depth > w.depth
    GROUP BY y.row
)
SELECT p.seq, p.pos, p.row, p.token AS input, p.final_token, y.site, y.layer, v.token AS top_token, y.target_rank,
       exp(y.target_logprob) AS target_probability, y.entropy, y.kl_to_final, e.leads_from
FROM place p JOIN layers y USING (row) JOIN vocabulary v ON v.token_id = y.top_id LEFT JOIN leads e USING (row)
ORDER BY p.row, y.depth;
