-- Shared by every script of the index: the text of this file is put in front of each of them.
-- Names, types and byte layouts of the keys are documented once, in keys.py.
--
-- KEYS[1]  {ns}:root          hash   which generation answers, which is being built
-- KEYS[2]  {ns}:<gen>:meta    hash   next sequence, log version, next cluster id
-- ARGV[1]  generation the caller works on; `@` and a replication id follow where what the caller knows
--          was read from a server, and holds for that server's history only
--
-- Every other key is made from KEYS[2]'s prefix and so lies in the same slot.

local RECORD = 136          -- u64 sequence (LE) + 128 x int8
local CHUNK = 60            -- records in one chunk string: 8,160 bytes, just under an 8 KiB block
local SPAN = 32             -- sequences in one bucket of image records
local LOAD = 40             -- inserts per lookup bucket: it keeps listpack encoding (see keys.py)
local LOG_LENGTH = 10000    -- changes kept; a worker further behind reads the whole table
local LIVE, COPY, DELETED = 0, 1, 2
local WHERE = 28            -- in an image's record, the first of 6 bytes: cluster, or a copy's original

local meta = KEYS[2]
local prefix = string.sub(meta, 1, -5)
local clusters = prefix .. 'clusters'
local centroids = prefix .. 'centroids'
local log = prefix .. 'log'

local function number(value) return string.format('%.0f', value) end

-- Names what this server has gone through: another one after a restart or a promotion, where writes
-- may be lost (Redis replication: "a replication ID marks a given history of the data set").
local function history()
  return string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)') or ''
end

local function served(claim)
  local generation, known = string.match(claim, '^([^@]*)@?(.*)$')
  if known ~= '' and known ~= history() then return false end
  local answers = redis.call('HMGET', KEYS[1], 'serving', 'building')
  return answers[1] == generation or answers[2] == generation
end

-- Linear hashing: the number of buckets follows the number of sequences handed out.
-- Answers with the function from a kind of lookup and a digest to the key of its bucket.
local function buckets_after(sequences)
  local buckets = math.floor(sequences / LOAD) + 1
  local size = 1
  while size * 2 <= buckets do size = size * 2 end
  return function(kind, digest)
    local hash = struct.unpack('>I4', digest)
    local at = hash % (size * 2)
    if at >= buckets then at = hash % size end
    return prefix .. kind .. number(at)
  end
end

local function split_bucket(kind, new)
  local size = 1
  while size * 2 <= new do size = size * 2 end
  local from = prefix .. kind .. number(new - size)
  local entries = redis.call('HGETALL', from)
  local leaving, fields = {}, {}
  for i = 1, #entries, 2 do
    if struct.unpack('>I4', entries[i]) % (size * 2) == new then
      leaving[#leaving + 1] = entries[i]
      leaving[#leaving + 1] = entries[i + 1]
      fields[#fields + 1] = entries[i]
    end
  end
  if #fields == 0 then return end
  redis.call('HSET', prefix .. kind .. number(new), unpack(leaving))
  redis.call('HDEL', from, unpack(fields))
end

-- Hands out sequences after `count`, and lets the lookups grow with them; answers with the last one.
local function hand_out(count, many)
  local last = redis.call('HINCRBY', meta, 'sequence', many)
  for full = math.floor(count / LOAD) + 1, math.floor(last / LOAD) do
    split_bucket('id:', full)
    split_bucket('sha:', full)
  end
  return last
end

local function sequences() return tonumber(redis.call('HGET', meta, 'sequence') or 0) end

local function record_key(sequence) return prefix .. 'rec:' .. number(math.floor(sequence / SPAN)) end

-- Fields of one sequence in its bucket: +0 record, +1 image id, +2 verdict, +3 earlier sequence of the id.
local function field(sequence, which) return (sequence % SPAN) * 4 + which end

local function read_record(sequence)
  local packed = redis.call('HGET', record_key(sequence), field(sequence, 0))
  if not packed then return nil end
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
  return redis.call('HGET', record_key(sequence), field(sequence, 1)) or ''
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

local function read_records(cluster, first, last)
  local pieces = {}
  for index = math.floor(first / CHUNK), math.floor((last - 1) / CHUNK) do
    local from = math.max(first - index * CHUNK, 0) * RECORD
    local upto = math.min(last - index * CHUNK, CHUNK) * RECORD - 1
    pieces[#pieces + 1] = redis.call('GETRANGE', chunk_key(cluster, index), from, upto)
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
local function found(generation, model, layout, centroid)
  redis.call('HSET', KEYS[1], 'model:' .. generation, model, 'layout:' .. generation, layout)
  redis.call('HSET', meta, 'sequence', 0, 'version', 0, 'cluster', 1)
  local first = struct.pack('>I4', 1)
  redis.call('HSET', centroids, first, centroid)
  write_state(first, {epoch = 1, length = 0, live = 0})
  log_change('', first .. centroid)
end
