-- The features that fire on the same tokens as a feature.
--
-- Over plain rows, of the same SAE. jaccard is rows with both over rows with either; pmi = ln(p(both) / (p(a) p(b))), in
-- nats: 0 is chance.
-- :sae       sae            the SAE's id
-- :feature   feature        the feature
-- :min_both  integer = 5    partners with fewer common rows are left out
-- :k         integer = 20   how many, by jaccard
WITH plain AS (SELECT row FROM tokens WHERE NOT (is_special OR is_template OR is_repeat)),
-- Token-major: what else fires on the feature's own rows. `activations WHERE row = …` would be a scan.
fired AS (
    SELECT unnest(firings($sae, row)) AS one
    FROM activations JOIN plain USING (row)
    WHERE sae = $sae AND feature = $feature
),
partners AS (SELECT one.feature AS partner, count(*) AS n_both FROM fired GROUP BY partner),
own AS (SELECT n_firings FROM features WHERE sae = $sae AND feature = $feature)
SELECT b.partner AS feature, b.n_both, f.n_firings, b.n_both / (o.n_firings + f.n_firings - b.n_both) AS jaccard,
       ln(b.n_both * (SELECT count(*) FROM plain)::DOUBLE / (o.n_firings::DOUBLE * f.n_firings)) AS pmi, f.density, f.label
FROM partners b JOIN features f ON f.sae = $sae AND f.feature = b.partner CROSS JOIN own o
WHERE b.partner <> $feature AND b.n_both >= $min_both
ORDER BY jaccard DESC, b.partner
LIMIT $k;
