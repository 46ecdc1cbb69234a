-- How strongly features are expressed in documents: a matrix in long form, ready for a clustered heat map.
--
-- One line per document and feature, zeros included. activation is over the document's plain rows: their mean with
-- zeros, their highest, or the share on which the feature fires. Without features, the k whose activation varies most
-- over the documents. Documents without plain rows are left out.
-- :sae       sae               the SAE's id
-- :docs      documents = null  which documents; none: all
-- :features  integers = null   which features
-- :k         count = 50        how many features, where none are given
-- :measure   text = mean       mean, max or share
WITH chosen AS (
    SELECT doc FROM documents
    WHERE $docs IS NULL OR list_bool_and(list_transform($docs, lambda c: coalesce(CASE c.key
        WHEN 'doc' THEN len(list_filter(c.spans, lambda s: doc BETWEEN s[1] AND s[2])) > 0
        WHEN 'text' THEN text LIKE c.value
        ELSE metadata ->> c.key = c.value END, false)))
),
plain AS (
    SELECT row, doc FROM tokens
    WHERE doc IN (SELECT doc FROM chosen) AND NOT (is_special OR is_template OR is_repeat)
),
sizes AS (
    SELECT doc, count(*) AS n_rows FROM plain GROUP BY doc
),
lists AS (
    SELECT doc, firings($sae, row) AS fired FROM plain
),
fired AS (
    SELECT doc, unnest(fired, recursive := true) FROM lists
),
measured AS (
    SELECT f.doc, f.feature, CASE $measure
        WHEN 'mean' THEN sum(f.activation::DOUBLE) / any_value(s.n_rows)
        WHEN 'max' THEN max(f.activation)
        WHEN 'share' THEN count(*) / any_value(s.n_rows)
        ELSE error('measure is ' || $measure || '; accepted: mean, max, share')
    END AS activation
    FROM fired f JOIN sizes s USING (doc)
    WHERE $features IS NULL OR list_contains($features, f.feature)
    GROUP BY f.doc, f.feature
),
n AS (
    SELECT count(*) AS n_docs FROM sizes
),
shown AS (
    SELECT CASE
        WHEN feature < (SELECT count(*) FROM features WHERE sae = $sae) THEN feature
        ELSE error('There is no feature ' || feature || ' of ' || $sae)::BIGINT
    END AS feature
    FROM (SELECT unnest(CAST($features AS BIGINT[])) AS feature)
    UNION ALL
    SELECT feature FROM (
        SELECT feature, sum(pow(activation, 2)) / n_docs - pow(sum(activation) / n_docs, 2) AS variance
        FROM measured CROSS JOIN n
        WHERE $features IS NULL
        GROUP BY feature, n_docs
        ORDER BY variance DESC, feature LIMIT $k
    )
)
SELECT z.doc, w.feature, coalesce(m.activation, 0) AS activation, f.label
FROM sizes z CROSS JOIN shown w
LEFT JOIN measured m ON m.doc = z.doc AND m.feature = w.feature
JOIN features f ON f.sae = $sae AND f.feature = w.feature
ORDER BY z.doc, w.feature
LIMIT (
    SELECT CASE WHEN count(*) = 0 THEN error(
        'No document with plain rows fits docs; there are documents 0 to ' || (SELECT max(doc) FROM documents)
        || ', with the metadata that the query metadata_values lists')::BIGINT END
    FROM plain
);
