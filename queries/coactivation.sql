-- The features that fire on the same rows as a feature: its partners.
--
-- Over plain rows; reads the list of every row on which the feature fires. jaccard is n_both over the rows on which
-- either fires; pmi, in nats, the logarithm of how much oftener both fire together than chance would have it.
-- :sae       sae              the SAE's id
-- :feature   feature          the feature
-- :other     sae = null       the SAE of the partners, if not the same
-- :by        text = jaccard   what orders: jaccard or pmi, highest first
-- :min_both  count = 1        partners that fire together with it at least so often
-- :k         count = 20       how many
WITH own AS (
    SELECT t.row FROM activations a JOIN tokens t USING (row)
    WHERE a.sae = $sae AND a.feature = $feature AND NOT (t.is_special OR t.is_template OR t.is_repeat)
),
lists AS (
    SELECT firings(coalesce($other, $sae), row) AS fired FROM own
),
fired AS (
    SELECT unnest(fired, recursive := true) FROM lists
),
met AS (
    SELECT feature, count(*) AS n_both FROM fired
    WHERE feature <> $feature OR coalesce($other, $sae) <> $sae
    GROUP BY feature HAVING count(*) >= $min_both
),
scored AS (
    SELECT m.feature, m.n_both, f.n_firings, m.n_both / (n.n_own + f.n_firings - m.n_both) AS jaccard,
           ln(m.n_both / n.n_own / f.density) AS pmi, f.density, f.label
    FROM met m JOIN features f ON f.sae = coalesce($other, $sae) AND f.feature = m.feature
    CROSS JOIN (SELECT count(*) AS n_own FROM own) n
)
SELECT coalesce($other, $sae) AS sae, feature, n_both, n_firings, jaccard, pmi, density, label
FROM scored
ORDER BY CASE $by WHEN 'jaccard' THEN jaccard ELSE round(pmi, 9) END DESC, n_both DESC, feature
LIMIT (SELECT CASE
    WHEN $by IN ('jaccard', 'pmi') THEN $k
    ELSE error('by is ' || $by || '; accepted: jaccard, pmi')::BIGINT
END);
