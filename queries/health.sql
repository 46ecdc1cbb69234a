-- What was proved about the stored numbers: every check, those that failed first.
--
-- A check says what was found and what was expected; ok is NULL where nothing was proved, for example by too few rows.
-- :subject  text = *         whose checks: a site or SAE, as a pattern
-- :bad      boolean = false  only checks that are not ok or not proved
SELECT name, subject, value, expected, ok
FROM health
WHERE subject GLOB $subject AND NOT ($bad AND coalesce(ok, false))
ORDER BY CASE WHEN ok THEN 2 WHEN ok IS NULL THEN 1 ELSE 0 END, subject, name, expected;
