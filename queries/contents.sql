-- What is stored: documents, sites, SAEs, lenses, predictions and attention, with their sizes.
--
-- n is documents of the corpus, rows of predictions, lenses and attention, firings of an SAE, and NULL for a site, whose
-- rows are all of the corpus.
SELECT 'corpus' AS kind, (SELECT model FROM store) AS name, NULL::INTEGER AS layer, NULL::INTEGER AS width,
       (SELECT count(*) FROM documents) AS n
UNION ALL SELECT 'site', site, layer, width, NULL FROM sites
UNION ALL
SELECT 'SAE', s.sae, s.layer, s.width, coalesce((SELECT sum(f.n_firings) FROM features f WHERE f.sae = s.sae), 0)
FROM saes s
UNION ALL SELECT 'predictions', 'predictions', NULL, NULL, count(*) FROM predictions HAVING count(*) > 0
UNION ALL
SELECT 'lens', lens || ' ' || site, CAST(split_part(site, '.', 2) AS INTEGER), NULL, count(*)
FROM lens_summary GROUP BY lens, site
UNION ALL SELECT 'attention', 'layer ' || layer, layer, NULL, count(*) FROM attention_rows GROUP BY layer
ORDER BY kind, layer NULLS FIRST, name;
