-- A direction that tells two groups of rows apart at a site (their difference of means), applied back to the rows.
--
-- score is how far a row lies on A's side of the plane halfway between the means, in units of the site, along the
-- direction mean_a − mean_b; the k rows furthest on either side are shown, A's first. accuracy is the share of rows on
-- their own side, both groups counting alike: of the rows that made the direction, which flatters it, or, with
-- `fit_on`, of the others. n_a and n_b are the rows that made it, distance is that of the means.
-- A group is the plain rows of documents (topic=sports, doc=0-99, text=%goal%, several with &), those with some tokens
-- only, or the given rows.
-- :site    site              a stored site
-- :a       documents = null  one group, by its documents
-- :b       documents = null  the other, by its documents
-- :a_rows  integers = null   one group, by its rows
-- :b_rows  integers = null   the other, by its rows
-- :tokens  texts = null      of the documents only rows with these tokens
-- :fit_on  documents = null  make the direction from rows of these documents, and test it on the others
-- :k       count = 20        rows shown on each side
WITH fitting AS (
    SELECT doc, list_transform([$a, $b, $fit_on], lambda conditions: list_bool_and(
        list_transform(conditions, lambda c: coalesce(CASE c.key
            WHEN 'doc' THEN len(list_filter(c.spans, lambda s: doc BETWEEN s[1] AND s[2])) > 0
            WHEN 'text' THEN text LIKE c.value
            ELSE metadata ->> c.key = c.value
        END, false)))) AS fits
    FROM documents
),
plain AS (
    SELECT t.row, f.fits FROM tokens t JOIN fitting f USING (doc)
    WHERE (f.fits[1] OR f.fits[2]) AND NOT (t.is_special OR t.is_template OR t.is_repeat)
      AND ($tokens IS NULL OR t.token_id IN (SELECT token_id(unnest(CAST($tokens AS VARCHAR[])))))
),
named AS (
    SELECT row, 'a' AS side FROM plain WHERE fits[1]
    UNION
    SELECT unnest(CAST($a_rows AS BIGINT[])), 'a'
    UNION
    SELECT row, 'b' FROM plain WHERE fits[2]
    UNION
    SELECT unnest(CAST($b_rows AS BIGINT[])), 'b'
),
grouped AS (
    SELECT n.row, n.side, t.doc, t.pos, t.token, count(*) OVER (PARTITION BY n.row) AS n_sides,
           $fit_on IS NULL OR t.doc IN (SELECT doc FROM fitting WHERE fits[3]) AS fitted
    FROM named n LEFT JOIN tokens t USING (row)
),
n AS (
    SELECT count(*) FILTER (fitted AND side = 'a') AS n_a, count(*) FILTER (fitted AND side = 'b') AS n_b, CASE
        WHEN max(n_sides) > 1
        THEN error('Row ' || min(row) FILTER (n_sides > 1) || ' is in both groups; give each row to one')::BIGINT
        WHEN least(n_a, n_b) = 0
        THEN error('Group a has ' || n_a || ' and group b ' || n_b || ' rows; give a or a_rows, and b or b_rows: the'
                   || ' query metadata_values lists what documents have')::BIGINT
        ELSE $k END AS k
    FROM grouped
),
vectors AS (
    SELECT side, act($site, row) AS vector FROM grouped CROSS JOIN n WHERE fitted AND k > 0  -- checked before
),
numbers AS (
    SELECT side, unnest(vector)::DOUBLE AS number, generate_subscripts(vector, 1) AS dimension FROM vectors
),
means AS (
    SELECT dimension, avg(number) FILTER (side = 'a') AS mean_a, avg(number) FILTER (side = 'b') AS mean_b
    FROM numbers GROUP BY dimension
),
probe AS (
    SELECT list(mean_a - mean_b ORDER BY dimension) AS direction, CASE
               WHEN sum(pow(mean_a - mean_b, 2)) > 0 THEN sqrt(sum(pow(mean_a - mean_b, 2)))
               ELSE error('The means of both groups are the same: no direction tells them apart')
           END AS distance,
           sum((mean_a - mean_b) * (mean_a + mean_b)) / 2 AS middle
    FROM means
),
scored AS (
    SELECT g.*, p.distance,
           (list_dot_product(CAST(act($site, g.row) AS DOUBLE[]), p.direction) - p.middle) / p.distance AS score
    FROM grouped g CROSS JOIN probe p
),
judged AS (
    SELECT (avg(CAST(score > 0 AS DOUBLE)) FILTER (side = 'a') + avg(CAST(score < 0 AS DOUBLE)) FILTER (side = 'b')) / 2
           AS accuracy
    FROM scored WHERE $fit_on IS NULL OR NOT fitted
),
furthest AS (
    SELECT * FROM scored
    QUALIFY least(row_number() OVER (ORDER BY score DESC, row), row_number() OVER (ORDER BY score, row DESC))
            <= (SELECT k FROM n)
)
SELECT f.score, f.side, f.token, snippet(f.row, 10, 4) AS example, f.doc, f.pos, f.row, f.fitted, j.accuracy, n.n_a,
       n.n_b, f.distance
FROM furthest f CROSS JOIN judged j CROSS JOIN n
ORDER BY f.score DESC, f.row;
