-- How often a feature fires how strongly: 20 equal bins of (0, maximum].
--
-- Over plain rows; share is of the feature's firings.
-- :sae      sae      the SAE's id
-- :feature  feature  the feature
WITH counted AS (
    SELECT unnest(histogram) AS n_firings, generate_subscripts(histogram, 1) AS bin, max_activation::DOUBLE AS maximum,
           n_firings AS n_all, len(histogram) AS n_bins
    FROM features WHERE sae = $sae AND feature = $feature
)
SELECT bin, maximum * (bin - 1) / n_bins AS above, maximum * bin / n_bins AS up_to, n_firings,
       n_firings / nullif(n_all, 0) AS share
FROM counted
ORDER BY bin;
