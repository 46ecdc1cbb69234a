-- What every attention head does: how spread its attention is, and how much goes where.
--
-- Means over plain rows. entropy is in nats; previous_token, self_attention and bos_attention are the weight on the
-- token before, on the token itself and on the sequence's first row (the attention sink); induction is the weight on
-- what followed earlier occurrences of the token. NULL where no row has the number.
-- :layer  layer = null        one layer only
-- :by     text = layer        layer (and head), or the score that orders, highest first
-- :k      count = 10000       how many heads
-- :needs  heads  extract with --attention-top 8
SELECT layer, head, entropy, previous_token, self_attention, bos_attention, induction
FROM heads
WHERE $layer IS NULL OR layer = $layer
ORDER BY CASE $by
    WHEN 'layer' THEN 0
    WHEN 'entropy' THEN entropy
    WHEN 'previous_token' THEN previous_token
    WHEN 'self_attention' THEN self_attention
    WHEN 'bos_attention' THEN bos_attention
    WHEN 'induction' THEN induction
    ELSE error('by is ' || $by || '; accepted: layer, entropy, previous_token, self_attention, bos_attention, induction')
END DESC NULLS LAST, layer, head
LIMIT $k;
