-- The features that write in the same direction as a feature, in its own SAE and in the others.
--
-- cosine is that of what the features write into the residual stream (decoder rows; through W_O and the gain of a
-- post-norm where the SAE sits before them), so a feature can be followed through layers. The k nearest of each SAE;
-- features that write nothing have no cosine and are left out, and so are SAEs beside the residual stream.
-- :sae      sae           the SAE's id
-- :feature  feature       the feature
-- :other    sae = null    features of this SAE only
-- :k        count = 5     how many of each SAE
WITH own AS (
    SELECT feature_direction($sae, CAST($feature AS INTEGER)) AS direction
),
compared AS (
    SELECT f.sae, f.feature, list_cosine_similarity(feature_direction(f.sae, f.feature), o.direction) AS cosine
    FROM features f CROSS JOIN own o
    WHERE f.sae IN (
        SELECT coalesce($other, sae) FROM feature_logits WHERE feature = 0 AND rank = 1  -- SAEs on the way there
        UNION ALL
        SELECT coalesce($other, $sae)
    ) AND NOT (f.sae = $sae AND f.feature = $feature)
),
nearest AS (
    SELECT sae, feature, cosine FROM compared
    QUALIFY row_number() OVER (PARTITION BY sae ORDER BY isnan(cosine), cosine DESC, feature) <= $k
)
SELECT s.layer, s.site, n.sae, n.feature, n.cosine, f.density, f.max_activation, f.label
FROM nearest n JOIN saes s USING (sae) JOIN features f USING (sae, feature)
WHERE NOT isnan(n.cosine)
ORDER BY s.layer, n.sae, n.cosine DESC, n.feature;
