-- Shared by every script of the index: the text of this file is put in front of each of them.
-- Names, types and byte layouts of the keys are documented once, in keys.py.
--
-- KEYS[1]  {ns}:root          hash   which generation answers, which is being built
-- KEYS[2]  {ns}:<gen>:meta    hash   next sequence, log version, next cluster id, salt
-- KEYS[3]  {ns}:<gen>:never          does not exist, so nothing runs while the slot is being moved
-- ARGV[1]  generation the caller works on; `@` and a replication id follow where what the caller knows
--          was read from a server, and holds for that server's history only
--
-- Every other key is made from KEYS[2]'s prefix and so lies in the same slot.

local RECORD = 136          -- u64 sequence (LE) + 128 x int8
local CHUNK = 60            -- records in one chunk string: 8,160 bytes, just under an 8 KiB block
local SPAN = 32             -- sequences in one bucket of image records
local LOAD = 40             -- inserts per lookup bucket: it keeps listpack encoding (see keys.py)
local LOG_LENGTH = 10000    -- changes kept; a worker further behind reads the whole table
local FIELDS = 1000         -- arguments of one command: Lua's stack takes some 8,000
local LIVE, COPY, DELETED = 0, 1, 2
local CHAIN = 1000          -- earlier lives of an id looked for where they are not remembered
local FILES = 2147483648    -- partitions from here on are files that a rebuild read, one each
local WHERE = 28            -- in an image's record, the first of 6 bytes: cluster, or a copy's original

local meta = KEYS[2]
local prefix = string.sub(meta, 1, -5)
local clusters = prefix .. 'clusters'
local centroids = prefix .. 'centroids'
local log = prefix .. 'log'

local function number(value) return string.format('%.0f', value) end

-- Ends a script, before it writes: what is missing was neither deleted nor lost with all that came
-- after it.
local function damaged(what)
  error('the index is damaged: ' .. what .. '; see `python -m worker fsck`', 0)
end

-- Names what this server has gone through: another one after a restart or a promotion, where writes
-- may be lost (Redis replication: "a replication ID marks a given history of the data set").
local function history()
  return string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or ''
end

-- The policy by which this server removes keys where it is full; '' when it refuses writes instead.
local function evicting()
  local memory = redis.call('INFO', 'memory')
  local policy = string.match(memory, 'maxmemory_policy:([%w-]+)') or 'noeviction'
  if policy == 'noeviction' or string.match(memory, 'maxmemory:0%s') then return '' end
  return policy
end

local function served(claim)
  local generation, known = string.match(claim, '^([^@]*)@?(.*)$')
  if known ~= '' and known ~= history() then return false end
  local answers = redis.call('HMGET', KEYS[1], 'serving', 'building')
  return answers[1] == generation or answers[2] == generation
end

-- Counters of the generation: salt of its lookups (none where layout 1 was written), sequences
-- handed out.
local function lookups()
  local read = redis.call('HMGET', meta, 'salt', 'sequence')
  -- It is there from the beginning; without it sequences would be handed out once more.
  if not read[2] then damaged('nothing tells how many images there are') end
  return read[1], tonumber(read[2])
end

-- Whoever sends events chooses the digests; the salt, which nobody is told, chooses the buckets.
local hashes = {}
local function hash_of(salt, digest)
  if not salt then return (struct.unpack('>I4', digest)) end
  local hash = hashes[digest]
  if not hash then
    hash = tonumber(string.sub(redis.sha1hex(salt .. digest), 1, 8), 16)
    hashes[digest] = hash
  end
  return hash
end

-- Linear hashing: the number of buckets follows the number of sequences handed out.
-- Answers with the function from a digest to the number of its bucket, of whatever kind.
local function numbers_after(salt, sequences)
  local buckets = math.floor(sequences / LOAD) + 1
  local size = 1
  while size * 2 <= buckets do size = size * 2 end
  return function(digest)
    local hash = hash_of(salt, digest)
    local at = hash % (size * 2)
    if at >= buckets then at = hash % size end
    return at
  end
end

local function bucket_key(kind, bucket) return prefix .. kind .. number(bucket) end

-- The function from a kind of lookup and a digest to the key of its bucket.
local function buckets_after(salt, sequences)
  local bucket_of = numbers_after(salt, sequences)
  return function(kind, digest) return bucket_key(kind, bucket_of(digest)) end
end

-- The bucket among the first `buckets` whose entries bucket `new` will get.
local function source_of(new, buckets)
  while new >= buckets do
    local size = 1
    while size * 2 <= new do size = size * 2 end
    new = new - size
  end
  return new
end

-- What leaves a bucket for others, field, value, field, ... by the key it goes to.
local function leaving(kind, bucket, bucket_of)
  local from, targets = bucket_key(kind, bucket), {}
  local entries = redis.call('HGETALL', from)
  for i = 1, #entries, 2 do
    local target = bucket_of(entries[i])
    if target ~= bucket then
      local key = bucket_key(kind, target)
      local moved = targets[key] or {}
      targets[key] = moved
      moved[#moved + 1], moved[#moved + 2] = entries[i], entries[i + 1]
    end
  end
  return {from = from, targets = targets}
end

-- Reads what has to move where the lookups grow; nothing is written before all of it is known.
local function growth(salt, count, last)
  local old, new = math.floor(count / LOAD) + 1, math.floor(last / LOAD) + 1
  local bucket_of, moves, seen = numbers_after(salt, last), {}, {}
  for bucket = old, new - 1 do
    local source = source_of(bucket, old)
    if not seen[source] then
      seen[source] = true
      for _, kind in ipairs({'id:', 'sha:'}) do
        moves[#moves + 1] = leaving(kind, source, bucket_of)
      end
    end
  end
  return moves
end

local function move(from, target, entries)
  for first = 1, #entries, FIELDS do
    local last = math.min(first + FIELDS - 1, #entries)
    redis.call('HSET', target, unpack(entries, first, last))
    local fields = {}
    for i = first, last, 2 do fields[#fields + 1] = entries[i] end
    redis.call('HDEL', from, unpack(fields))
  end
end

-- Hands out sequences after `count`, and lets the lookups grow with them; answers with the function
-- from a kind of lookup and a digest to the bucket of it from now on.
local function hand_out(salt, count, many)
  local last = count + many
  local moves = growth(salt, count, last)
  redis.call('HINCRBY', meta, 'sequence', many)
  for _, each in ipairs(moves) do
    for target, entries in pairs(each.targets) do move(each.from, target, entries) end
  end
  return buckets_after(salt, last)
end

local function record_key(sequence) return prefix .. 'rec:' .. number(math.floor(sequence / SPAN)) end

-- Fields of one sequence in its bucket: +0 record, +1 image id, +2 verdict, +3 earlier sequence of the id.
local function field(sequence, which) return (sequence % SPAN) * 4 + which end

local function read_record(sequence)
  local packed = redis.call('HGET', record_key(sequence), field(sequence, 0))
  if not packed then damaged('sequence ' .. number(sequence) .. ' has no record') end
  local kind, sha, partition, high, low, where_high, where_low =
    struct.unpack('>Bc16I4I2I4I2I4', packed)
  local record = {
    kind = kind, sha = sha, partition = partition, offset = high * 4294967296 + low,
    where = where_high * 4294967296 + where_low,
  }
  if kind == DELETED then
    local at, dhigh, dlow = struct.unpack('>I4I2I4', string.sub(packed, 34))
    record.deleted_partition, record.deleted_offset = at, dhigh * 4294967296 + dlow
  end
  return record
end

local function pack_record(record)
  local packed = struct.pack('>Bc16I4I2I4I2I4', record.kind, record.sha, record.partition,
    math.floor(record.offset / 4294967296), record.offset % 4294967296,
    math.floor(record.where / 4294967296), record.where % 4294967296)
  if record.kind ~= DELETED then return packed end
  return packed .. struct.pack('>I4I2I4', record.deleted_partition,
    math.floor(record.deleted_offset / 4294967296), record.deleted_offset % 4294967296)
end

local function write_record(sequence, record)
  redis.call('HSET', record_key(sequence), field(sequence, 0), pack_record(record))
end

local function image_name(sequence)
  local name = redis.call('HGET', record_key(sequence), field(sequence, 1))
  if not name then damaged('sequence ' .. number(sequence) .. ' has no id') end
  return name
end

local function past_key(digest) return prefix .. 'past:' .. digest end

local function position(partition, offset)
  return struct.pack('>I4I2I4', partition, math.floor(offset / 4294967296), offset % 4294967296)
end

-- Keeps that an event was of a life of an id: of each life and partition the last one is enough.
local function remember(past, partition, offset, sequence)
  local at = position(partition, offset)
  local before = redis.call('ZREVRANGEBYLEX', past, '(' .. at, '[' .. string.sub(at, 1, 4),
    'LIMIT', 0, 1)[1]
  if before and struct.unpack('>I8', before, 11) == sequence then
    redis.call('ZREM', past, before)
  end
  redis.call('ZADD', past, 0, at .. struct.pack('>I8', sequence))
end

-- Remembers the events that a record tells, before another life takes its place.
local function remember_life(past, sequence, record)
  remember(past, record.partition, record.offset, sequence)
  if record.kind == DELETED then
    remember(past, record.deleted_partition, record.deleted_offset, sequence)
  end
end

-- Remembers the lives before `latest` of an id whose lives were written by a version that kept only
-- the way back: once an id, and so many at most. All are read first: some would pass for all.
local function remember_chain(past, latest)
  local lives = {}
  for _ = 1, CHAIN do
    latest = tonumber(redis.call('HGET', record_key(latest), field(latest, 3)))
    if not latest then break end
    lives[#lives + 1] = {sequence = latest, record = read_record(latest)}
  end
  for _, life in ipairs(lives) do remember_life(past, life.sequence, life.record) end
end

-- Whether the topic told an event of an id.
local function is_on_topic(past, record)
  if record.partition < FILES then return true end
  if record.kind == DELETED and record.deleted_partition < FILES then return true end
  local first = redis.call('ZRANGE', past, 0, 0)[1]
  return first and struct.unpack('>I4', first) < FILES
end

-- Which life of an id an event is of that is not the newest of its partition: the one that the next
-- event of this partition was of. nil: it is newer than all its partition has done to the id.
-- A file holds what was before the topic, whenever it is read: once the topic has told an event of the
-- id, what a file tells that is not known is too late for a life of its own, and counts for the latest.
local function life_at(digest, latest, record, partition, offset)
  local past, at = past_key(digest), position(partition, offset)
  if redis.call('EXISTS', past) == 0 then remember_chain(past, latest) end
  local next = redis.call('ZRANGEBYLEX', past, '[' .. at,
    '[' .. string.sub(at, 1, 4) .. string.rep('\255', 15), 'LIMIT', 0, 1)[1]
  if next then return (struct.unpack('>I8', next, 11)) end
  if record.partition == partition and offset <= record.offset then return latest end
  if record.kind == DELETED and record.deleted_partition == partition
    and offset <= record.deleted_offset then return latest end
  if partition >= FILES and is_on_topic(past, record) then return latest end
  return nil
end

-- A cluster's state: epoch, records written (dead ones too), live records; nil when retired.
local function state_of(cluster)
  local packed = redis.call('HGET', clusters, cluster)
  if not packed then return nil end
  local epoch, length, live = struct.unpack('>I4I4I4', packed)
  return {epoch = epoch, length = length, live = live}
end

local function write_state(cluster, state)
  local packed = struct.pack('>I4I4I4', state.epoch, state.length, state.live)
  redis.call('HSET', clusters, cluster, packed)
  return packed
end

-- Whether a cluster waits for a split, or has so many dead records that it is to be compacted.
local function is_due(state, limit)
  return state.live >= limit or state.length >= 1.5 * limit or state.live * 2 < state.length
end

local function chunk_key(cluster, index)
  return prefix .. 'c:' .. number(struct.unpack('>I4', cluster)) .. ':' .. number(index)
end

-- Appends whole records; a chunk that became full is stored again, exactly as large as it is,
-- because APPEND over-allocates.
local function append(cluster, state, records)
  local at = 1
  while at <= #records do
    local room = (CHUNK - state.length % CHUNK) * RECORD
    local piece = string.sub(records, at, at + room - 1)
    local key = chunk_key(cluster, math.floor(state.length / CHUNK))
    if #piece == CHUNK * RECORD then
      redis.call('SET', key, piece)
    else
      redis.call('APPEND', key, piece)
      if #piece == room then redis.call('SET', key, redis.call('GET', key)) end
    end
    state.length = state.length + #piece / RECORD
    state.live = state.live + #piece / RECORD
    at = at + #piece
  end
end

-- Fewer than asked for where some are missing: whatever a damaged state counts, nothing is read
-- behind the first gap.
local function read_records(cluster, first, last)
  local pieces = {}
  for index = math.floor(first / CHUNK), math.floor((last - 1) / CHUNK) do
    local from = math.max(first - index * CHUNK, 0) * RECORD
    local upto = math.min(last - index * CHUNK, CHUNK) * RECORD - 1
    local piece = redis.call('GETRANGE', chunk_key(cluster, index), from, upto)
    pieces[#pieces + 1] = piece
    if #piece <= upto - from then break end
  end
  return table.concat(pieces)
end

-- One entry of the centroid log: clusters retired, then id and centroid of each one added.
local function log_change(retired, added)
  local current = redis.call('HINCRBY', meta, 'version', 1)
  redis.call('XADD', log, 'MAXLEN', '~', LOG_LENGTH, number(current) .. '-1',
    'retired', retired, 'added', added)
  return current
end

-- Makes an empty generation with one cluster.
local function found(generation, model, layout, centroid, salt)
  redis.call('HSET', KEYS[1], 'model:' .. generation, model, 'layout:' .. generation, layout)
  redis.call('HSET', meta, 'sequence', 0, 'version', 0, 'cluster', 1, 'salt', salt)
  local first = struct.pack('>I4', 1)
  redis.call('HSET', centroids, first, centroid)
  write_state(first, {epoch = 1, length = 0, live = 0})
  log_change('', first .. centroid)
end
