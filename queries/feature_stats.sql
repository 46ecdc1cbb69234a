-- How often and how strongly features of an SAE fire, and how many never do.
--
-- Over plain rows. density is firings divided by rows; quantiles are of the firings' activations; n_dead and n_features
-- are of the whole SAE. Without a feature, the densest come first.
-- :sae      sae               the SAE's id
-- :feature  feature = null    one feature only
-- :k        count = 20        how many features
SELECT feature, n_firings, density, max_activation, mean_activation, std_activation, p50, p90, p99, label,
       (SELECT count(*) FROM features WHERE sae = $sae AND n_firings = 0) AS n_dead,
       (SELECT count(*) FROM features WHERE sae = $sae) AS n_features
FROM features
WHERE sae = $sae AND ($feature IS NULL OR feature = $feature)
ORDER BY n_firings DESC, feature
LIMIT $k;
