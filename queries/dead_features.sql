-- The features of an SAE that never fire, or almost never.
--
-- Over plain rows of this store: another corpus may wake them. n_dead and n_features are of the whole SAE, as in
-- feature_stats.
-- :sae   sae         the SAE's id
-- :most  amount = 0  with features that fire at most so often
SELECT feature, n_firings, density, max_activation, label,
       (SELECT count(*) FROM features WHERE sae = $sae AND n_firings = 0) AS n_dead,
       (SELECT count(*) FROM features WHERE sae = $sae) AS n_features
FROM features
WHERE sae = $sae AND n_firings <= $most
ORDER BY n_firings, feature;
