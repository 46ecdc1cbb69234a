-- The tokens whose logits a feature raises most, and those it lowers most.
--
-- logit is what a unit of activation adds along the direct path: decoder row (through W_O and the gain of a post-norm
-- where the SAE sits before them) × gain of the final norm × unembedding, before the cap and the norm's scale, less the
-- mean over the vocabulary. rank counts from the highest, negative ranks from the lowest; ten of each are kept.
-- :sae      sae          the SAE's id
-- :feature  feature      the feature
-- :k        count = 10   how many at each end
SELECT l.rank, v.token, l.logit, l.token_id
FROM feature_logits l JOIN vocabulary v USING (token_id)
WHERE l.sae = $sae AND l.feature = $feature AND abs(l.rank) <= CASE
    WHEN EXISTS (SELECT 1 FROM feature_logits WHERE sae = $sae) THEN $k
    ELSE error('There are no logits of ' || $sae || ': its site is not on the way into the residual stream')::BIGINT
END
ORDER BY l.rank < 0, l.rank;
