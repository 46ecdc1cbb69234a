-- What the documents' metadata say: every key with its values, and how many documents have each.
--
-- These are the conditions that tell groups of documents apart: key=value in compare_groups, feature_expression and
-- probe_direction. Values are those of the first level, as text; the most frequent of each key come first.
-- :key  text = null   one key only
-- :k    count = 20    values of each key
WITH counted AS (
    SELECT held.key, held.value ->> '$' AS value, count(*) AS n_documents
    FROM documents, json_each(metadata) held
    WHERE $key IS NULL OR held.key = $key
    GROUP BY ALL
),
ranked AS (
    SELECT *, row_number() OVER (PARTITION BY key ORDER BY n_documents DESC, value) AS place,
           count(*) OVER (PARTITION BY key) AS n_values
    FROM counted
)
SELECT key, value, n_documents, n_values
FROM ranked WHERE place <= $k
ORDER BY key, place;
