-- The features that fire on one token.
--
-- share is the activation over the feature's strongest one in the store; density tells how special the feature is.
-- :sae  sae         the SAE's id
-- :row  row         the token's row
-- :k    count = 20  how many, strongest first
WITH fired AS (
    SELECT unnest(firings($sae, CAST($row AS BIGINT)), recursive := true)
)
SELECT f.feature, f.activation, f.activation / nullif(s.max_activation, 0) AS share, s.density, s.label
FROM fired f LEFT JOIN features s ON s.sae = $sae AND s.feature = f.feature
ORDER BY f.activation DESC, f.feature
LIMIT $k;
