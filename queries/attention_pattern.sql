-- Where the tokens of a document look: the attention pattern of one head, or of every head of a layer.
--
-- One line per edge: the token that looks (pos, token), the one it looks at (key_pos, key_token), and the weight. Where
-- the site `pattern.<layer>` is stored, every weight above 0; otherwise the heaviest keys that were kept. kept_weight
-- is the sum of the weights listed for that token and head: what is missing to 1 was not kept.
-- :doc    doc             the document
-- :layer  layer           the layer
-- :head   head = null     one head only
-- :seq    integer = null  one sequence of the document only
WITH here AS (
    SELECT row, seq, pos, token FROM tokens
    WHERE doc = $doc AND CASE
        WHEN $seq IS NULL OR seq = $seq THEN true
        WHEN $seq NOT IN (SELECT seq FROM sequences WHERE doc = $doc)
        THEN error('document ' || $doc || ' has no sequence ' || $seq)::BOOLEAN
        ELSE false
    END
),
whole AS (
    SELECT p.row, p.pos, CAST(r.recipe -> 'corpus' ->> 'context' AS INTEGER) AS context, act(s.site, p.row) AS weights
    FROM here p CROSS JOIN sites s JOIN passes r USING (pass)
    WHERE s.site = 'pattern.' || $layer
),
weighed AS (
    SELECT row, pos, context, unnest(range(len(weights))) AS place, unnest(weights) AS weight FROM whole
),
kept AS (
    SELECT row, unnest(edges(CAST($layer AS INTEGER), row), recursive := true) FROM here
    WHERE NOT EXISTS (SELECT 1 FROM sites WHERE site = 'pattern.' || $layer)
),
found AS (
    SELECT row, CAST((place - mod(place, context)) / context AS INTEGER) AS head,
           row - pos + mod(place, context) AS key_row, weight
    FROM weighed WHERE weight > 0
    UNION ALL BY NAME
    SELECT row, head, key_row, weight FROM kept
)
SELECT CAST($layer AS INTEGER) AS layer, f.head, p.seq, p.row, p.pos, p.token, k.row AS key_row, k.pos AS key_pos,
       k.token AS key_token, f.weight, sum(f.weight) OVER (PARTITION BY f.head, f.row) AS kept_weight
FROM found f JOIN here p ON p.row = f.row JOIN here k ON k.row = f.key_row
WHERE CASE
    WHEN $head IS NULL OR f.head = $head THEN true
    WHEN $head NOT BETWEEN 0 AND (SELECT max(head) FROM found)
    THEN error('layer ' || $layer || ' has no head ' || $head)::BOOLEAN
    ELSE false
END
ORDER BY f.head, p.row, f.weight DESC, k.row;
