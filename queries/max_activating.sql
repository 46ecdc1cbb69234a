-- The strongest firings of a feature, each in its context.
--
-- With per_document at most so many of each document are shown, the strongest; n_merged then counts all firings of
-- the feature in that document. Special, template and repeated tokens are left out. Ties go by row.
-- :sae           sae              the SAE's id
-- :feature       feature          the feature
-- :k             count = 20       how many
-- :per_document  integer = 0      at most so many of one document; 0: no limit
-- :before        integer = 10     tokens shown before
-- :after         integer = 10     tokens shown after
WITH firing AS (
    -- `examples` holds the strongest 100 of every feature: where they suffice, nothing else is read.
    SELECT row, activation FROM examples
    WHERE sae = $sae AND feature = $feature AND $per_document < 1 AND $k <= 100
    UNION ALL
    SELECT row, activation FROM activations
    WHERE sae = $sae AND feature = $feature AND ($per_document > 0 OR $k > 100)
),
placed AS (
    SELECT f.row, f.activation, t.doc, t.pos, t.token,
           row_number() OVER (PARTITION BY t.doc ORDER BY f.activation DESC, f.row) AS place,
           count(*) OVER (PARTITION BY t.doc) AS n_merged
    FROM firing f JOIN tokens t USING (row)
    WHERE NOT (t.is_special OR t.is_template OR t.is_repeat)
),
chosen AS (
    SELECT * FROM placed
    WHERE $per_document < 1 OR place <= $per_document
    ORDER BY activation DESC, row LIMIT $k
)
SELECT activation, token, snippet(row, $before, $after) AS example, doc, pos, row,
       CASE WHEN $per_document > 0 THEN n_merged END AS n_merged
FROM chosen
ORDER BY activation DESC, row;
