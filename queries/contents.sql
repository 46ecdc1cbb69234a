-- What is stored: corpus, passes, sites, SAEs, lenses, attention, predictions and health, with counts.
--
-- n counts what `counted` says; a pass, and the sites it made, are whole when all of its shards are done. Firings are
-- those of plain rows.
WITH found AS (
    SELECT 1 AS place, 'corpus' AS kind, 'documents' AS name, count(*) AS n, 'documents' AS counted,
           max(segment) + 1 || ' segments' AS detail
    FROM documents
    UNION ALL BY NAME
    SELECT 1 AS place, 'corpus' AS kind, 'sequences' AS name, count(*) AS n, 'sequences' AS counted FROM sequences
    UNION ALL BY NAME
    SELECT 1 AS place, 'corpus' AS kind, 'tokens' AS name, count(*) AS n, 'rows' AS counted,
           count(*) FILTER (NOT (is_special OR is_template OR is_repeat)) || ' plain' AS detail
    FROM tokens
    UNION ALL BY NAME
    SELECT 2 AS place, 'pass' AS kind, pass AS name, done AS n, 'of ' || total || ' shards' AS counted FROM passes
    UNION ALL BY NAME
    SELECT 3 AS place, 'site' AS kind, s.site AS name, s.layer, s.width, p.done AS n,
           'of ' || p.total || ' shards' AS counted, s.dtype AS detail
    FROM sites s LEFT JOIN passes p USING (pass)
    UNION ALL BY NAME
    SELECT 4 AS place, 'sae' AS kind, s.sae AS name, s.layer, s.width, f.n, 'firings' AS counted,
           s.architecture || ' at ' || s.site || ', ' || f.n_dead || ' dead, ' || f.n_labels || ' labels' AS detail
    FROM saes s LEFT JOIN (
        SELECT sae, sum(n_firings) AS n, count(*) FILTER (n_firings = 0) AS n_dead, count(label) AS n_labels
        FROM features GROUP BY sae
    ) f USING (sae)
    UNION ALL BY NAME
    SELECT 5 AS place, 'lens' AS kind, lens AS name, CAST(nullif(split_part(site, '.', 2), '') AS INTEGER) AS layer,
           count(*) AS n, 'read-outs' AS counted, site AS detail
    FROM lens_summary GROUP BY lens, site
    UNION ALL BY NAME
    SELECT 6 AS place, 'attention' AS kind, 'attention.' || layer AS name, layer, count(*) AS n, 'heads' AS counted
    FROM heads GROUP BY layer
    UNION ALL BY NAME
    SELECT 7 AS place, 'predictions' AS kind, 'predictions' AS name, count(*) AS n, 'rows' AS counted
    FROM predictions HAVING count(*) > 0
    UNION ALL BY NAME
    SELECT 8 AS place, 'health' AS kind, 'health' AS name, count(*) AS n, 'checks' AS counted,
           count(*) FILTER (NOT ok) || ' not ok, ' || count(*) FILTER (ok IS NULL) || ' not proved' AS detail
    FROM health
)
SELECT kind, name, layer, width, n, counted, detail
FROM found
ORDER BY place, layer NULLS LAST, name, detail;
