-- Which tokens a feature fires on, and how much likelier there than anywhere.
--
-- Over plain rows. share is that of the token's n_tokens occurrences on which the feature fires, lift is share over the
-- feature's density, means are over firings. Ordered by n_firings · ln(lift), so that neither one lucky firing nor a
-- frequent token leads; example shows the strongest firing.
-- :sae      sae            the SAE's id
-- :feature  feature        the feature
-- :k        count = 20     how many tokens
WITH fired AS (
    SELECT t.token_id, count(*) AS n_firings, avg(a.activation::DOUBLE) AS mean_activation,
           max(a.activation) AS max_activation, arg_max(a.row, (a.activation, -a.row)) AS row
    FROM activations a JOIN tokens t USING (row)
    WHERE a.sae = $sae AND a.feature = $feature AND NOT (t.is_special OR t.is_template OR t.is_repeat)
    GROUP BY t.token_id
),
met AS (
    SELECT token_id, count(*) AS n_tokens FROM tokens
    WHERE NOT (is_special OR is_template OR is_repeat) AND token_id IN (SELECT token_id FROM fired)
    GROUP BY token_id
),
ranked AS (
    SELECT f.*, m.n_tokens, f.n_firings / m.n_tokens AS share, f.n_firings / m.n_tokens / s.density AS lift
    FROM fired f JOIN met m USING (token_id) JOIN features s ON s.sae = $sae AND s.feature = $feature
    ORDER BY f.n_firings * ln(lift) DESC, f.token_id LIMIT $k
)
SELECT v.token, r.n_firings, r.n_tokens, r.share, r.lift, r.mean_activation, r.max_activation,
       snippet(r.row, 5, 3) AS example, r.row, r.token_id
FROM ranked r JOIN vocabulary v USING (token_id)
ORDER BY r.n_firings * ln(r.lift) DESC, r.token_id;
