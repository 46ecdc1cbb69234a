-- How strongly features are expressed on the tokens of documents: a matrix in long form, ready for a heat map.
--
-- One line per plain row and feature, zeros included. Without features, the k with the largest sum of activations.
-- :sae       sae              the SAE's id
-- :docs      documents        which documents
-- :features  integers = null  which features
-- :k         count = 50       how many features, where none are given
WITH chosen AS (
    SELECT doc FROM documents
    WHERE list_bool_and(list_transform($docs, lambda c: coalesce(CASE c.key
        WHEN 'doc' THEN len(list_filter(c.spans, lambda s: doc BETWEEN s[1] AND s[2])) > 0
        WHEN 'text' THEN text LIKE c.value
        ELSE metadata ->> c.key = c.value END, false)))
),
plain AS (
    SELECT row, doc, pos, token FROM tokens
    WHERE doc IN (SELECT doc FROM chosen) AND NOT (is_special OR is_template OR is_repeat)
),
lists AS (
    SELECT row, firings($sae, row) AS fired FROM plain
),
fired AS (
    SELECT row, unnest(fired, recursive := true) FROM lists
),
shown AS (
    SELECT CASE
        WHEN feature < (SELECT count(*) FROM features WHERE sae = $sae) THEN feature
        ELSE error('There is no feature ' || feature || ' of ' || $sae)::BIGINT
    END AS feature
    FROM (SELECT unnest(CAST($features AS BIGINT[])) AS feature)
    UNION ALL
    SELECT feature FROM (
        SELECT feature FROM fired WHERE $features IS NULL
        GROUP BY feature ORDER BY sum(activation::DOUBLE) DESC, feature LIMIT $k
    )
)
SELECT p.row, p.doc, p.pos, p.token, w.feature, coalesce(f.activation, 0) AS activation, s.label
FROM plain p CROSS JOIN shown w
LEFT JOIN fired f ON f.row = p.row AND f.feature = w.feature
JOIN features s ON s.sae = $sae AND s.feature = w.feature
ORDER BY p.row, w.feature
LIMIT (
    SELECT CASE WHEN count(*) = 0 THEN error(
        'No document with plain rows fits docs; there are documents 0 to ' || (SELECT max(doc) FROM documents)
        || ', with the metadata that the query metadata_values lists')::BIGINT END
    FROM plain
);
