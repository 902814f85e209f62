-- Moves records out of one cluster, all or some: the swap of a split, a merge, a compaction, or the
-- moving of boundary records. Either everything happens or nothing, and nothing when the cluster was
-- rewritten or the caller's lock is lost. Work: O(hard limit).
--
-- ARGV[2]  cluster, 4 bytes
-- ARGV[3]  epoch the plan was made for
-- ARGV[4]  fencing token
-- ARGV[5]  '1' retire the cluster, '0' keep it and zero what leaves
-- ARGV[6]  outputs, 132 bytes each: cluster id, 0 for a new one, and its centroid (read for new ones)
-- ARGV[7]  one byte a record: its output, from 1; 0 stays (or is dead). Records appended since the
--          plan are put to the nearest new output when the cluster retires (where none is new, to the
--          first one; where there is none at all, the answer is 'changed'), and stay otherwise
-- ARGV[8]  cluster limit
-- ARGV[9]  hard limit
-- ARGV[10] records appended since the plan that may be placed here
-- Returns  {'done', ids of the new clusters...}, {'changed'} (read again; the last cluster stays),
--          {'fenced'} (lock lost), {'stale'}

if not served(ARGV[1]) then return {'stale'} end
local cluster, retire = ARGV[2], ARGV[5] == '1'
local lock = prefix .. 'lock:' .. number(struct.unpack('>I4', cluster))
if redis.call('GET', lock) ~= ARGV[4] then return {'fenced'} end
local state = state_of(cluster)
if not state or state.epoch ~= tonumber(ARGV[3]) then return {'changed'} end
local planned = #ARGV[7]
if retire and state.length - planned > tonumber(ARGV[10]) then return {'changed'} end

local outputs = {}
for at = 1, #ARGV[6], 132 do
  local id = struct.unpack('>I4', ARGV[6], at)
  local output = {id = string.sub(ARGV[6], at, at + 3), records = {}, new = id == 0}
  if output.new then
    output.state = {epoch = 1, length = 0, live = 0}
    output.centroid = string.sub(ARGV[6], at + 4, at + 131)
  else
    output.state = state_of(output.id)
    if not output.state then return {'changed'} end
  end
  outputs[#outputs + 1] = output
end

local function signed(bytes)
  local values = {}
  for half = 1, 128, 64 do
    local part = {string.byte(bytes, half, half + 63)}
    for i = 1, 64 do values[#values + 1] = part[i] > 127 and part[i] - 256 or part[i] end
  end
  return values
end

local function nearest(vector)
  local best, best_at, values = nil, nil, signed(vector)
  for at, output in ipairs(outputs) do
    if output.new then
      if not output.values then output.values = signed(output.centroid) end
      local product, square = 0, 0
      for i = 1, 128 do
        product = product + values[i] * output.values[i]
        square = square + output.values[i] * output.values[i]
      end
      local near = square > 0 and product / math.sqrt(square) or 0
      if not best or near > best then best, best_at = near, at end
    end
  end
  return best_at or 1
end

-- All records where all of them leave; a few are read one by one.
local records = retire and read_records(cluster, 0, state.length)

local function record_at(index)
  if records then return string.sub(records, index * RECORD + 1, (index + 1) * RECORD) end
  return read_records(cluster, index, index + 1)
end

local leaving = {}
for index = 0, (retire and state.length or planned) - 1 do
  local target = index < planned and string.byte(ARGV[7], index + 1) or 0
  if target > 0 or retire then
    local record = record_at(index)
    local sequence = struct.unpack('<I8', record)
    if sequence > 0 then
      if index >= planned then target = nearest(string.sub(record, 9)) end
      local output = outputs[target]
      -- A living record the plan has no place for.
      if not output then return {'changed'} end
      output.records[#output.records + 1] = record
      leaving[#leaving + 1] = {index = index, sequence = sequence, output = output}
    end
  end
end
for _, output in ipairs(outputs) do
  if not output.new and output.state.length + #output.records > tonumber(ARGV[9]) then
    return {'changed'}
  end
end

-- Two workers may each have planned to merge an empty cluster into the other's.
if retire and #outputs == 0 and redis.call('HLEN', clusters) < 2 then return {'changed'} end

-- Images that will be told where their records are, those of one bucket in one go.
local buckets, by_key = {}, {}
for _, moved in ipairs(leaving) do
  local key = record_key(moved.sequence)
  local bucket = by_key[key]
  if not bucket then
    bucket = {key = key, fields = {}, outputs = {}}
    by_key[key], buckets[#buckets + 1] = bucket, bucket
  end
  bucket.fields[#bucket.fields + 1] = field(moved.sequence, 0)
  bucket.outputs[#bucket.outputs + 1] = moved.output
end
for _, bucket in ipairs(buckets) do
  bucket.images = redis.call('HMGET', bucket.key, unpack(bucket.fields))
  for _, image in ipairs(bucket.images) do
    if not image then
      damaged('cluster ' .. number(struct.unpack('>I4', cluster)) ..
        ' holds the record of an image that is missing')
    end
  end
end

-- From here on it only writes.
local outcome, added = {'done'}, {}
for _, output in ipairs(outputs) do
  if output.new then
    output.id = struct.pack('>I4', redis.call('HINCRBY', meta, 'cluster', 1))
    redis.call('HSET', centroids, output.id, output.centroid)
    added[#added + 1] = output.id .. output.centroid
    outcome[#outcome + 1] = output.id
  end
  output.where = struct.pack('>I2', 0) .. output.id
end
for _, bucket in ipairs(buckets) do
  local told = {}
  for at, image in ipairs(bucket.images) do
    told[2 * at - 1] = bucket.fields[at]
    told[2 * at] = string.sub(image, 1, WHERE - 1) .. bucket.outputs[at].where
  end
  redis.call('HSET', bucket.key, unpack(told))
end
if not retire then
  local nothing = string.rep('\0', RECORD)
  for _, moved in ipairs(leaving) do
    redis.call('SETRANGE', chunk_key(cluster, math.floor(moved.index / CHUNK)),
      moved.index % CHUNK * RECORD, nothing)
  end
end
for _, output in ipairs(outputs) do
  append(output.id, output.state, table.concat(output.records))
  write_state(output.id, output.state)
  if is_due(output.state, tonumber(ARGV[8])) then redis.call('SADD', prefix .. 'due', output.id) end
end
if retire then
  for index = 0, math.floor((state.length - 1) / CHUNK) do
    redis.call('UNLINK', chunk_key(cluster, index))
  end
  redis.call('HDEL', clusters, cluster)
  redis.call('HDEL', centroids, cluster)
  redis.call('SREM', prefix .. 'due', cluster)
  redis.call('DEL', lock)
  log_change(cluster, table.concat(added))
elseif #leaving > 0 then
  state.epoch, state.live = state.epoch + 1, state.live - #leaving
  write_state(cluster, state)
  if is_due(state, tonumber(ARGV[8])) then redis.call('SADD', prefix .. 'due', cluster) end
end
return outcome
