-- Asks whether what the caller knows still holds: generation and history of the server.
--
-- Returns  1 yes, 0 no

return served(ARGV[1]) and 1 or 0
