-- Which features tell two groups of documents apart, by effect size.
--
-- A group is one or more conditions that all hold, with & between: topic=sports (metadata), doc=0-99,200 (numbers),
-- text=%goal% (a pattern of LIKE). Without b, the other documents. A document counts once, with the mean activation of
-- its plain rows, zeros included; one without plain rows is left out.
-- effect is Cohen's d: mean_a − mean_b over the pooled standard deviation. t is Welch's, for groups that vary
-- unequally, with df degrees of freedom; p is its two-sided probability by chance, q the same corrected for all features
-- that fire in either group (Benjamini and Hochberg: of those with q below 0.05 about one in twenty is chance).
-- Activations are mostly zero and far from normal: of groups smaller than about twenty trust effect and fired_a,
-- fired_b (documents in which it fires), not p. NULL where neither group varies. example shows the strongest firing in
-- the group with the higher mean.
-- :sae  sae               the SAE's id
-- :a    documents         one group
-- :b    documents = null  the other
-- :k    count = 50        how many features
WITH fitting AS (
    SELECT doc, list_transform([$a, $b], lambda conditions: list_bool_and(list_transform(conditions, lambda c: coalesce(
        CASE c.key
            WHEN 'doc' THEN len(list_filter(c.spans, lambda s: doc BETWEEN s[1] AND s[2])) > 0
            WHEN 'text' THEN text LIKE c.value
            ELSE metadata ->> c.key = c.value
        END, false)))) AS fits
    FROM documents
),
chosen AS (
    SELECT doc, fits[1] AS in_a, CASE WHEN $b IS NULL THEN NOT fits[1] ELSE fits[2] END AS in_b
    FROM fitting WHERE in_a OR in_b
),
plain AS (
    SELECT t.row, t.doc, c.in_a, c.in_b FROM tokens t JOIN chosen c USING (doc)
    WHERE NOT (t.is_special OR t.is_template OR t.is_repeat)
),
sizes AS (
    SELECT doc, in_a, in_b, count(*) AS n_rows FROM plain GROUP BY ALL
),
n AS (
    SELECT count(*) FILTER (in_a) AS n_a, count(*) FILTER (in_b) AS n_b, CASE
        WHEN bool_or(in_a AND in_b)
        THEN error('Document ' || min(doc) FILTER (in_a AND in_b) || ' is in both groups; give each to one')::BIGINT
        WHEN least(n_a, n_b) < 2
        THEN error('Group a has ' || n_a || ' and group b ' || n_b || ' documents with plain rows, each needs 2; there'
                   || ' are documents 0 to ' || (SELECT max(doc) FROM documents)
                   || ', with the metadata that the query metadata_values lists')::BIGINT
        ELSE $k END AS k
    FROM sizes
),
lists AS (
    SELECT doc, row, firings($sae, row) AS fired FROM plain CROSS JOIN n WHERE k > 0  -- checked before
),
fired AS (
    SELECT doc, row, unnest(fired, recursive := true) FROM lists
),
by_document AS (
    SELECT f.doc, f.feature, s.in_a, sum(f.activation::DOUBLE) / s.n_rows AS mean, max(f.activation) AS strongest,
           arg_max(f.row, (f.activation, -f.row)) AS row
    FROM fired f JOIN sizes s USING (doc)
    GROUP BY f.doc, f.feature, s.in_a, s.n_rows
),
means AS (
    SELECT feature, count(*) FILTER (in_a) AS fired_a, count(*) FILTER (NOT in_a) AS fired_b,
           coalesce(sum(mean) FILTER (in_a), 0) / n_a AS mean_a,
           coalesce(sum(mean) FILTER (NOT in_a), 0) / n_b AS mean_b,
           -- What is the same in every document of a group does not vary, whatever rounding makes of it.
           (fired_a = 0 OR (fired_a = n_a AND min(mean) FILTER (in_a) = max(mean) FILTER (in_a)))
           AND (fired_b = 0 OR (fired_b = n_b AND min(mean) FILTER (NOT in_a) = max(mean) FILTER (NOT in_a)))
           AS constant
    FROM by_document CROSS JOIN n GROUP BY feature, n_a, n_b
),
spread AS (
    -- Documents in which a feature does not fire differ from the mean by the mean.
    SELECT feature, constant, mean_a, mean_b, fired_a, fired_b, n_a, n_b,
           arg_max(row, (in_a = (mean_a > mean_b), strongest, -row)) AS row,
           (coalesce(sum(pow(mean - mean_a, 2)) FILTER (in_a), 0) + (n_a - fired_a) * pow(mean_a, 2)) / (n_a - 1)
           AS variance_a,
           (coalesce(sum(pow(mean - mean_b, 2)) FILTER (NOT in_a), 0) + (n_b - fired_b) * pow(mean_b, 2)) / (n_b - 1)
           AS variance_b
    FROM by_document JOIN means USING (feature) CROSS JOIN n
    GROUP BY feature, constant, mean_a, mean_b, fired_a, fired_b, n_a, n_b
),
compared AS (
    SELECT feature, mean_a, mean_b, fired_a, fired_b, n_a, n_b, row, variance_a / n_a AS error_a,
           variance_b / n_b AS error_b, CASE WHEN NOT constant THEN mean_a - mean_b END AS difference,
           difference / sqrt(((n_a - 1) * variance_a + (n_b - 1) * variance_b) / (n_a + n_b - 2)) AS effect,
           difference / sqrt(error_a + error_b) AS t,
           CASE WHEN NOT constant
                THEN pow(error_a + error_b, 2) / (pow(error_a, 2) / (n_a - 1) + pow(error_b, 2) / (n_b - 1)) END AS df
    FROM spread
),
tested AS (
    SELECT *, t_test_p(t, df) AS p FROM compared
),
placed AS (
    SELECT *, row_number() OVER (ORDER BY p NULLS LAST) AS place, count(p) OVER () AS n_tests FROM tested
),
corrected AS (
    SELECT *, CASE WHEN p IS NOT NULL THEN least(1, min(p * n_tests / place) OVER (ORDER BY place DESC)) END AS q
    FROM placed
)
SELECT c.feature, c.effect, c.mean_a, c.mean_b, c.fired_a, c.fired_b, c.n_a, c.n_b, c.t, c.df, c.p, c.q,
       snippet(c.row, 8, 4) AS example, c.row, f.label
FROM corrected c JOIN features f ON f.sae = $sae AND f.feature = c.feature
-- Rounded, because features that fire in one document alone all have the same effect, but for the last digits.
ORDER BY round(abs(c.effect), 9) DESC NULLS LAST, c.feature
LIMIT (SELECT k FROM n);
