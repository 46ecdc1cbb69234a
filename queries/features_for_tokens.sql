-- The features that fire here and not there: a search by example.
--
-- Here are the given rows together with the plain rows of the given tokens; there likewise, or, where neither is given,
-- every plain row of the store. rate is the share of rows on which a feature fires, mean its mean activation with
-- zeros; features are ordered by rate_here − rate_there, then by mean_here. Of more than `most` rows on a side, so many
-- evenly spaced ones are taken; n_here and n_there are what was taken.
-- :sae         sae              the SAE's id
-- :rows        integers = null  rows on which it shall fire
-- :tokens      texts = null     texts of tokens on which it shall fire
-- :not_rows    integers = null  rows on which it shall not
-- :not_tokens  texts = null     texts of tokens on which it shall not
-- :most        count = 10000    rows of each side
-- :k           count = 20       how many features
WITH named AS (
    SELECT 'here' AS side, unnest(CAST($rows AS BIGINT[])) AS row
    UNION
    SELECT 'there', unnest(CAST($not_rows AS BIGINT[]))
    UNION
    SELECT w.side, t.row
    FROM tokens t JOIN (
        SELECT 'here' AS side, token_id(unnest(CAST($tokens AS VARCHAR[]))) AS token_id
        UNION ALL
        SELECT 'there', token_id(unnest(CAST($not_tokens AS VARCHAR[])))
    ) w USING (token_id)
    WHERE NOT (t.is_special OR t.is_template OR t.is_repeat)
),
placed AS (
    SELECT side, row, row_number() OVER (PARTITION BY side ORDER BY row) - 1 AS place,
           count(*) OVER (PARTITION BY side) AS n, count(*) OVER (PARTITION BY row) AS n_sides
    FROM named
),
taken AS (
    SELECT side, row, n_sides FROM placed WHERE mod(place * $most, n) < $most
),
checked AS (
    SELECT count(*) FILTER (side = 'here') AS n_here, count(*) FILTER (side = 'there') AS n_there, CASE
        WHEN $rows IS NULL AND $tokens IS NULL THEN error('Give rows or tokens on which the feature shall fire')::BIGINT
        WHEN max(n_sides) > 1
        THEN error('Row ' || min(row) FILTER (n_sides > 1) || ' is on both sides; give each row to one')::BIGINT
        WHEN n_here = 0 THEN error('No plain row has one of the tokens given as tokens')::BIGINT
        WHEN n_there = 0 AND $not_tokens IS NOT NULL
        THEN error('No plain row has one of the tokens given as not_tokens')::BIGINT
        ELSE $k END AS k
    FROM taken
),
lists AS (
    SELECT side, firings($sae, row) AS fired FROM taken CROSS JOIN checked WHERE k > 0  -- checked before
),
fired AS (
    SELECT side, unnest(fired, recursive := true) FROM lists
),
summed AS (
    SELECT feature, count(*) FILTER (side = 'here') AS here, count(*) FILTER (side = 'there') AS there,
           coalesce(sum(activation::DOUBLE) FILTER (side = 'here'), 0) AS total_here,
           coalesce(sum(activation::DOUBLE) FILTER (side = 'there'), 0) AS total_there
    FROM fired GROUP BY feature
),
rated AS (
    SELECT s.feature, s.here / c.n_here AS rate_here,
           CASE WHEN c.n_there > 0 THEN s.there / c.n_there ELSE f.density END AS rate_there,
           s.total_here / c.n_here AS mean_here,
           CASE WHEN c.n_there > 0 THEN s.total_there / c.n_there ELSE f.density * f.mean_activation END AS mean_there,
           c.n_here, nullif(c.n_there, 0) AS n_there, f.density, f.label
    FROM summed s JOIN features f ON f.sae = $sae AND f.feature = s.feature CROSS JOIN checked c
    WHERE s.here > 0
)
SELECT feature, rate_here, rate_there, mean_here, mean_there, n_here,
       coalesce(n_there, (SELECT count(*) FROM tokens WHERE NOT (is_special OR is_template OR is_repeat))) AS n_there,
       density, label
FROM rated
ORDER BY round(rate_here - rate_there, 9) DESC, mean_here DESC, feature
LIMIT (SELECT k FROM checked);
