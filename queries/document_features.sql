-- The features that characterise a document: those that fire more in it than elsewhere.
--
-- Over plain rows. lift is the share of the document's rows on which the feature fires over its density in the store;
-- features are ordered by n_rows · ln(lift), so that neither one lucky firing nor an always-on feature leads.
-- :doc  doc             the document
-- :sae  sae             the SAE's id
-- :k    count = 20      how many
WITH place AS (
    SELECT row FROM tokens WHERE doc = $doc AND NOT (is_special OR is_template OR is_repeat)
),
lists AS (
    SELECT row, firings($sae, row) AS fired FROM place
),
fired AS (
    SELECT row, unnest(fired, recursive := true) FROM lists
),
summed AS (
    SELECT feature, count(*) AS n_rows, max(activation) AS max_activation, arg_max(row, activation) AS row
    FROM fired GROUP BY feature
),
ranked AS (
    SELECT s.feature, s.n_rows, s.n_rows / p.n_rows / f.density AS lift, s.max_activation, s.row, f.label
    FROM summed s JOIN features f ON f.sae = $sae AND f.feature = s.feature
    CROSS JOIN (SELECT count(*) AS n_rows FROM place) p
    ORDER BY s.n_rows * ln(lift) DESC, s.feature
    LIMIT $k
)
SELECT feature, n_rows, lift, max_activation, snippet(row, 5, 3) AS strongest, label
FROM ranked
ORDER BY n_rows * ln(lift) DESC, feature
LIMIT $k;
