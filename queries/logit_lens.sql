-- What each layer would predict at each token of a document.
--
-- Reads stored residual streams through final norm, unembedding and soft cap; where only read-outs were stored
-- (--lens), and of a tuned lens (actstore save-lens), takes these. One line per site, position and rank.
-- :doc    doc              the document
-- :k      count = 1        tokens per site and position
-- :sites  text = resid_*   which sites, as a pattern
-- :lens   text = logit     which lens: logit, or the name of a tuned one that was saved
WITH place AS (
    SELECT row, seq, pos, token FROM tokens
    WHERE doc = $doc AND CASE
        WHEN $lens = 'logit' AND EXISTS (SELECT 1 FROM sites WHERE kind LIKE 'resid%' AND site GLOB $sites) THEN true
        WHEN EXISTS (SELECT 1 FROM lens_summary WHERE lens = $lens AND site GLOB $sites) THEN true
        ELSE error('Nothing is stored that the lens ' || $lens || ' reads at sites like ' || $sites
                   || '; the query contents lists what is')::BOOLEAN
    END
),
computed AS (
    SELECT s.site, s.layer, p.row, logit_lens(s.site, p.row, $k) AS tokens
    FROM place p CROSS JOIN sites s
    WHERE s.kind LIKE 'resid%' AND s.site GLOB $sites AND $lens = 'logit'
),
read_out AS (
    SELECT site, layer, row, unnest(range(1, len(tokens) + 1)) AS rank, unnest(tokens, recursive := true)
    FROM computed
    UNION ALL BY NAME
    SELECT l.site, CAST(split_part(l.site, '.', 2) AS INTEGER) AS layer, l.row, l.rank, l.token_id, v.token, l.logprob
    FROM lens_tokens l JOIN vocabulary v USING (token_id)
    WHERE l.row IN (SELECT row FROM place) AND l.rank <= $k AND l.site GLOB $sites AND l.lens = $lens
      AND ($lens <> 'logit' OR l.site NOT IN (SELECT site FROM sites))
)
SELECT r.site, r.layer, p.seq, p.pos, p.row, p.token AS input, r.rank, r.token_id, r.token, r.logprob
FROM read_out r JOIN place p USING (row)
ORDER BY r.layer, list_position(['resid_pre', 'resid_mid', 'resid_post'], split_part(r.site, '.', 1)), p.row, r.rank;
