-- How a feature's activations are spread: its firings in twenty bins of equal width.
--
-- Over plain rows, exact. A bin holds activations from low to just below high, the last one the strongest too; share is
-- that of the feature's firings. All bins are empty where the feature never fires.
-- :sae      sae      the SAE's id
-- :feature  feature  the feature
WITH bins AS (
    SELECT n_firings AS total, max_activation::DOUBLE / len(histogram) AS width, unnest(histogram) AS n_firings,
           generate_subscripts(histogram, 1) AS bin
    FROM features WHERE sae = $sae AND feature = $feature
)
SELECT bin, (bin - 1) * width AS low, bin * width AS high, n_firings, n_firings / nullif(total, 0) AS share
FROM bins
ORDER BY bin;
