-- Which tokens a feature fires on, with the lift over how common they are.
--
-- Over plain rows. recall is the share of the feature's firings that are on this token, precision the share of the
-- token's rows on which it fires; lift = recall / the token's share of all rows: 1 is chance.
-- :sae          sae            the SAE's id
-- :feature      feature        the feature
-- :min_firings  integer = 2    tokens with fewer firings are left out
-- :k            integer = 20   how many, most firings first
WITH plain AS (
    SELECT row, token_id FROM tokens WHERE NOT (is_special OR is_template OR is_repeat)
),
fired AS (
    SELECT p.token_id, count(*) AS n_firings, avg(a.activation::DOUBLE) AS mean_activation,
           max(a.activation) AS max_activation
    FROM activations a JOIN plain p USING (row)
    WHERE a.sae = $sae AND a.feature = $feature
    GROUP BY p.token_id
),
common AS (SELECT token_id, count(*) AS n_rows FROM plain GROUP BY token_id),
every AS (SELECT (SELECT sum(n_firings) FROM fired) AS n_firings, (SELECT count(*) FROM plain) AS n_rows)
SELECT v.token, f.token_id, f.n_firings, c.n_rows, f.n_firings / e.n_firings AS recall,
       f.n_firings / c.n_rows AS precision,
       (f.n_firings / e.n_firings) / (c.n_rows / e.n_rows) AS lift, f.mean_activation, f.max_activation
FROM fired f JOIN common c USING (token_id) JOIN vocabulary v USING (token_id) CROSS JOIN every e
WHERE f.n_firings >= $min_firings
ORDER BY f.n_firings DESC, f.token_id
LIMIT $k;
