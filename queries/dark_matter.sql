-- What an SAE explains worst: its dark matter, by token, document or row.
--
-- Over plain rows. unexplained = Σ‖x − x_hat‖² / Σ‖x‖² of the group; of a transcoder, x is what it should write.
-- groups of fewer than min_rows rows are left out. NULL keys are those of the other groupings.
-- :sae       sae             the SAE's id
-- :by        text = token    token, document or row
-- :min_rows  integer = 1     rows that a group has at least
-- :k         integer = 20    how many, worst first
WITH asked AS (
    SELECT CASE WHEN $by IN ('token', 'document', 'row') THEN $by
                ELSE error('by is ' || $by || '; accepted: token, document or row') END AS unit
),
explained AS (
    SELECT r.row, t.doc, t.token_id, r.l0, r.norm::DOUBLE ** 2 AS square, r.error_norm::DOUBLE ** 2 AS error
    FROM reconstruction r JOIN tokens t USING (row)
    WHERE r.sae = $sae AND NOT (t.is_special OR t.is_template OR t.is_repeat) AND r.error_norm IS NOT NULL
),
keyed AS (
    SELECT e.*, CASE unit WHEN 'token' THEN e.token_id WHEN 'document' THEN e.doc ELSE e.row END AS key, unit
    FROM explained e CROSS JOIN asked
),
worst AS (
    SELECT unit, key, count(*) AS n_rows, sum(error) / sum(square) AS unexplained, avg(l0) AS mean_l0, min(row) AS first_row
    FROM keyed GROUP BY unit, key HAVING count(*) >= $min_rows
    ORDER BY unexplained DESC, key LIMIT $k
)
SELECT w.unexplained, w.n_rows, w.mean_l0, t.token, CASE WHEN w.unit = 'token' THEN w.key END AS token_id,
       CASE WHEN w.unit = 'document' THEN w.key WHEN w.unit = 'row' THEN t.doc END AS doc,
       CASE WHEN w.unit = 'row' THEN w.key END AS row, snippet(w.first_row, 10, 10) AS example
FROM worst w JOIN tokens t ON t.row = w.first_row
ORDER BY w.unexplained DESC, w.key;
