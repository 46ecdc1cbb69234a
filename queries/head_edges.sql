-- The strongest edges of an attention head, with both ends in their context.
--
-- token and example are the token that looks, key_token and key_example the one it looks at. Special, template and
-- repeated tokens do not look; edges to the sequence's first row, the attention sink, and to the token itself are left
-- out unless asked for. Ties go by row, then by key_row. Edges lighter than --attention-min are not listed.
-- :layer   layer            the layer
-- :head    head             the head
-- :k       count = 20       how many
-- :doc     doc = null       one document only
-- :sink    boolean = false  with edges to the sequence's first row
-- :itself  boolean = false  with edges of a token to itself
-- :window  amount = 6       tokens shown before and after each end
-- :needs  attention  extract with --attention-top 8
WITH strongest AS (
    SELECT a.row, a.key_row, a.weight, t.doc, t.pos, t.token, k.pos AS key_pos, k.token AS key_token
    FROM attention a JOIN tokens t ON t.row = a.row JOIN tokens k ON k.row = a.key_row
    WHERE a.layer = $layer AND a.head = $head AND ($doc IS NULL OR t.doc = $doc)
      AND NOT (t.is_special OR t.is_template OR t.is_repeat)
      AND ($sink OR k.pos > 0) AND ($itself OR a.key_row <> a.row)  -- of `a` alone: no join of all rows with all
    ORDER BY a.weight DESC, a.row, a.key_row LIMIT $k
),
checked AS (
    FROM strongest
    UNION ALL BY NAME
    SELECT error('no attention of layer ' || $layer || ', head ' || $head || ' is stored')::FLOAT AS weight
    FROM (SELECT count(*) AS n_heads FROM heads WHERE layer = $layer AND head = $head) WHERE n_heads = 0
)
SELECT weight, token, key_token, pos - key_pos AS distance, snippet(row, $window, $window) AS example,
       snippet(key_row, $window, $window) AS key_example, doc, row, key_row
FROM checked
ORDER BY weight DESC, row, key_row;
