-- Examples of a feature from across its activation range, as dashboards show them.
--
-- The range from 0 to the strongest firing is cut into intervals of equal width (low to high; the strongest firing is
-- in the highest); of each, k firings evenly spaced by rank are shown, its strongest among them. n_firings are all in
-- the interval, share is that of the feature's firings. Special, template and repeated tokens are left out.
-- :sae        sae          the SAE's id
-- :feature    feature      the feature
-- :intervals  count = 10   how many intervals
-- :k          count = 5    examples of each interval
-- :before     amount = 10  tokens shown before
-- :after      amount = 10  tokens shown after
WITH firing AS (
    SELECT a.row, a.activation, t.doc, t.pos, t.token, s.max_activation::DOUBLE / $intervals AS width,
           s.n_firings AS total,
           least(CAST(floor(a.activation::DOUBLE / s.max_activation * $intervals) AS BIGINT), $intervals - 1) AS bin
    FROM activations a JOIN tokens t USING (row) JOIN features s USING (sae, feature)
    WHERE a.sae = $sae AND a.feature = $feature AND NOT (t.is_special OR t.is_template OR t.is_repeat)
),
placed AS (
    SELECT *, row_number() OVER (PARTITION BY bin ORDER BY activation DESC, row) - 1 AS place,
           count(*) OVER (PARTITION BY bin) AS n_firings
    FROM firing
),
chosen AS (
    SELECT * FROM placed WHERE mod(place * $k, n_firings) < $k
)
SELECT bin * width AS low, (bin + 1) * width AS high, n_firings, n_firings / total AS share, activation, token,
       snippet(row, $before, $after) AS example, doc, pos, row
FROM chosen
ORDER BY bin DESC, activation DESC, row;
