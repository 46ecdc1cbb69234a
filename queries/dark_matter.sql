-- What an SAE explains worst: rows, tokens or documents with the largest part of their norm left unexplained.
--
-- Over plain rows. unexplained is the sum of squared errors over the sum of squared norms: 0 where the reconstruction
-- is perfect, 1 where it says nothing. l0 is the mean number of features that fire, norm and error_norm are means;
-- example shows the row that is explained worst. Rows whose error is not known are left out: of a cross-layer
-- transcoder all but those of its lowest layer.
-- :sae       sae            the SAE's id
-- :by        text = row     row, token or document
-- :min_rows  count = 1      tokens or documents with at least so many rows
-- :k         count = 20     how many
WITH measured AS (
    SELECT r.row, r.l0, r.norm::DOUBLE AS norm, r.error_norm::DOUBLE AS error_norm, t.doc, t.token_id, CASE $by
        WHEN 'row' THEN r.row
        WHEN 'token' THEN t.token_id
        WHEN 'document' THEN t.doc
        ELSE error('by is ' || $by || '; accepted: row, token, document')::BIGINT
    END AS subject
    FROM reconstruction r JOIN tokens t USING (row)
    WHERE r.sae = $sae AND r.norm > 0 AND r.error_norm IS NOT NULL
      AND NOT (t.is_special OR t.is_template OR t.is_repeat)
),
worst AS (
    SELECT subject, sum(pow(error_norm, 2)) / sum(pow(norm, 2)) AS unexplained, avg(l0) AS l0, avg(norm) AS norm,
           avg(error_norm) AS error_norm, count(*) AS n_rows, arg_max(row, (error_norm / norm, -row)) AS row
    FROM measured GROUP BY subject HAVING count(*) >= $min_rows
    ORDER BY unexplained DESC, subject LIMIT $k
)
SELECT w.unexplained, t.token, w.l0, w.norm, w.error_norm, w.n_rows, snippet(w.row, 10, 4) AS example, t.doc, t.pos,
       w.row
FROM worst w JOIN tokens t USING (row)
ORDER BY w.unexplained DESC, w.subject
LIMIT (SELECT CASE
    WHEN EXISTS (SELECT 1 FROM reconstruction WHERE sae = $sae AND error_norm IS NOT NULL) THEN $k
    ELSE error('What ' || $sae || ' leaves unexplained is not known: no row of `reconstruction` has its error')::BIGINT
END);
