-- The features of an SAE that never fire in this store, or hardly ever.
--
-- Over plain rows. n_found counts all such features, n_features the SAE's. A feature that is dead here may fire on
-- another text.
-- :sae          sae            the SAE's id
-- :max_firings  integer = 0    features with at most so many firings
-- :k            integer = 100  how many to list
SELECT feature, n_firings, max_activation, label, count(*) OVER () AS n_found,
       (SELECT count(*) FROM features WHERE sae = $sae) AS n_features
FROM features
WHERE sae = $sae AND n_firings <= $max_firings
ORDER BY n_firings, feature
LIMIT $k;
