-- Arrivals of one batch: recognise each, or insert it and read what was there before, in one step.
-- Running it again with the same arguments changes nothing and answers with the same sequences.
-- Work: O(arrivals + probed clusters + tail budget), whatever the namespace holds and whoever chose
-- the ids: each 40th insert also divides a bucket of ids and one of bytes, some 60 entries each. In
-- layout 1, which has no salt, a bucket holds whatever was aimed at it: 2 to 4 ms for 1,000 entries.
--
-- ARGV[2]  for all of them, packed (BE): u8 placing, else only recognising; u64 log version by which
--          they were routed; u32 records a reply may carry; u32 cluster limit, at which a cluster is
--          due; u32 hard limit, at which an insert is refused
-- ARGV[3]  clusters that any of them probes: 4 bytes id + 12 bytes state the caller holds; ...
-- ARGV[4]  the arrivals, packed (BE): u8 storing, else a check that writes nothing; 16 bytes SHA-256
--          of the id; 16 bytes SHA-256 of the image; u32 partition; u48 offset; u32 length and image
--          id; u32 length and vector (128 x int8, or none: recognising); u32 length and probes (u32
--          place in ARGV[3] each, from 1, home first); ...
--          No two of them have the same id or the same image.
-- Returns  {log version, answers, tails}, or {} when the generation does not answer any more, or the
--          server's history is another
--          answers: u8 outcome, u64 sequence, u64 origin sequence, u32 length and text; ...
--          tails: 4 bytes cluster, 12 bytes state, u32 index of the first record, u32 how many, the
--          records; ... of what the caller lacks, these arrivals' own records included
--   new       unknown id and bytes (recognise only)
--   seen      settled before; the text is its verdict
--   conflict  the id is known with other bytes
--   exact     same bytes as the origin, whose id is the text
--   placed    inserted now (a check: nothing written; origin is the image's own earlier sequence)
--   again     inserted before but never settled
--   moved     a cluster named is retired, or a check was routed by an old log: follow the log
--   behind    the tails are over the budget: load the clusters, ask again
--   full      a home cluster is at the hard limit: split it, ask again; the text is its id
--   held      one before it of its partition is to be asked again, and it would overtake that one

local NEW, SEEN, CONFLICT, EXACT, PLACED, AGAIN, MOVED, BEHIND, FULL, HELD = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9

if not served(ARGV[1]) then return {} end
local placing, routed_by, budget, limit, hard_limit = struct.unpack('>BI8I4I4I4', ARGV[2])
placing = placing == 1
local version = tonumber(redis.call('HGET', meta, 'version'))
local salt, count = lookups()
local lookup = buckets_after(salt, count)

-- Everything is read before an arrival is written: an error leaves no trace of it.
local inserts = {}
local names, held, states = {}, {}, {}
local wanted, total, all_wanted = {}, 0, true

-- The first record of a probed cluster that the caller lacks, and how many there are.
local function tail(place, state)
  if state == held[place] then return 0, 0 end
  local epoch, length = struct.unpack('>I4I4', state)
  local known_epoch, first = struct.unpack('>I4I4', held[place])
  if known_epoch ~= epoch then first = 0 end
  return first, length - first
end

local function read_states()
  for at = 1, #ARGV[3], 16 do
    names[#names + 1] = string.sub(ARGV[3], at, at + 3)
    held[#held + 1] = string.sub(ARGV[3], at + 4, at + 15)
  end
  local lacking = 0
  for first = 1, #names, FIELDS do
    local part = {unpack(names, first, math.min(first + FIELDS - 1, #names))}
    for at, state in ipairs(redis.call('HMGET', clusters, unpack(part))) do
      local place = first + at - 1
      states[place] = state
      if not state then
        all_wanted = false
      elseif state ~= held[place] then
        lacking = lacking + select(2, tail(place, state))
      end
    end
  end
  all_wanted = all_wanted and lacking <= budget
end

-- Whether all clusters of an arrival can be answered; then they will be.
local function admit(probes)
  if all_wanted then return PLACED end
  local more, lacking = {}, 0
  for at = 1, #probes, 4 do
    local place = struct.unpack('>I4', probes, at)
    if not states[place] then return MOVED end
    if not wanted[place] then
      more[#more + 1] = place
      lacking = lacking + select(2, tail(place, states[place]))
    end
  end
  if total + lacking > budget then return BEHIND end
  total = total + lacking
  for _, place in ipairs(more) do wanted[place] = true end
  return PLACED
end

-- The sequence an event was given earlier, or nil when it is to be inserted.
-- An id may live more than once (add, delete, add): an older event finds its own life.
local function earlier_life(one)
  local record = read_record(one.known)
  local own = life_at(one.digest, one.known, record, one.partition, one.offset)
  if own and own ~= one.known then return own, read_record(own) end
  if own or record.kind ~= DELETED then return one.known, record end
  one.former = record
  return nil, nil
end

local function copies_key(sha) return prefix .. 'copies:' .. sha end

-- The earliest living image with these bytes that is not the image itself.
local function same_bytes(one)
  local head = redis.call('HGET', lookup('sha:', one.sha), one.sha)
  if not head then return nil end
  head = tonumber(head)
  if head ~= one.known then return head end
  local copy = redis.call('ZRANGE', copies_key(one.sha), 0, 0)[1]
  return copy and tonumber(copy)
end

-- What an arrival that was stored before is told.
local function repeated(one, sequence, record)
  if record.sha ~= one.sha then return CONFLICT, sequence end
  local name, verdict = unpack(redis.call('HMGET', record_key(sequence), field(sequence, 1),
    field(sequence, 2)))
  -- Its verdict could not be kept, and it would be asked again for ever.
  if not name then damaged('sequence ' .. number(sequence) .. ' has no id') end
  if verdict then return SEEN, sequence, verdict end
  if record.kind == COPY then
    return EXACT, sequence, image_name(record.where), record.where
  end
  if not placing then return NEW end
  local outcome = admit(one.probes)
  return outcome == PLACED and AGAIN or outcome, sequence
end

local homes = {}

-- The state of a home cluster as it will be, and the records it will get.
local function home_at(place)
  if not homes[place] then
    local epoch, length, live = struct.unpack('>I4I4I4', states[place])
    homes[place] = {state = {epoch = epoch, length = length, live = live}, records = {}}
  end
  return homes[place]
end

local function plan(one, kind, where)
  one.kind, one.where = kind, where
  inserts[#inserts + 1] = one
  return count + #inserts
end

-- What one arrival is told: outcome, sequence, text, origin.
local function decide(one)
  local known = redis.call('HGET', lookup('id:', one.digest), one.digest)
  if known then
    one.known = tonumber(known)
    if one.storing then
      local sequence, record = earlier_life(one)
      if sequence then return repeated(one, sequence, record) end
    end
  end
  local original = same_bytes(one)
  if original then
    local name, new = image_name(original), count + #inserts + 1
    if one.storing then new = plan(one, COPY, original) end
    return EXACT, new, name, original
  end
  if not placing then return NEW end
  -- What is stored is compared again by the sequence it has; a check would be told what came later.
  if not one.storing and version ~= routed_by then return MOVED end
  local outcome = admit(one.probes)
  if outcome ~= PLACED then return outcome end
  if not one.storing then return PLACED, count + #inserts + 1, '', one.known or 0 end
  local place = struct.unpack('>I4', one.probes)
  local home = home_at(place)
  if home.state.length + #home.records >= hard_limit then
    redis.call('SADD', prefix .. 'due', names[place])
    return FULL, 0, names[place]
  end
  local new = plan(one, LIVE, struct.unpack('>I4', names[place]))
  home.records[#home.records + 1] = struct.pack('<I8', new) .. one.vector
  return PLACED, new
end

-- Fields of the records, those of one bucket in one command.
local function write_records()
  local buckets = {}
  for at, one in ipairs(inserts) do
    local new = count + at
    local key, first = record_key(new), field(new, 0)
    local fields = buckets[key] or {}
    buckets[key] = fields
    local size = #fields
    fields[size + 1], fields[size + 2] = first, pack_record(one)
    fields[size + 3], fields[size + 4] = first + 1, one.id
    if one.known then fields[size + 5], fields[size + 6] = first + 3, number(one.known) end
  end
  for key, fields in pairs(buckets) do redis.call('HSET', key, unpack(fields)) end
end

local function write_lookups()
  local after = hand_out(salt, count, #inserts)
  for at, one in ipairs(inserts) do
    local new = number(count + at)
    redis.call('HSET', after('id:', one.digest), one.digest, new)
    if one.former then remember_life(past_key(one.digest), one.known, one.former) end
    if one.kind == COPY then
      redis.call('ZADD', copies_key(one.sha), new, new)
    else
      redis.call('HSET', after('sha:', one.sha), one.sha, new)
    end
  end
end

local function write_clusters()
  for place, home in pairs(homes) do
    if #home.records > 0 then
      append(names[place], home.state, table.concat(home.records))
      states[place] = write_state(names[place], home.state)
      if is_due(home.state, limit) then redis.call('SADD', prefix .. 'due', names[place]) end
    end
  end
end

-- The records of a tail. What is missing of them would shift all that is answered behind it.
local function whole(name, first, lacking)
  local records = read_records(name, first, first + lacking)
  if #records ~= lacking * RECORD then
    damaged('records of cluster ' .. number(struct.unpack('>I4', name)) .. ' are missing')
  end
  return records
end

local function tails()
  local found = {}
  for place, name in ipairs(names) do
    local state = states[place]
    if state and state ~= held[place] then
      local first, lacking = tail(place, state)
      local known = all_wanted or wanted[place]
      if not known and total + lacking <= budget then
        total, known = total + lacking, true
      end
      if known then
        found[#found + 1] = name .. state .. struct.pack('>I4I4', first, lacking)
        if lacking > 0 then found[#found + 1] = whole(name, first, lacking) end
      end
    end
  end
  return table.concat(found)
end

read_states()
local answers, waits, at = {}, {}, 1
while at <= #ARGV[4] do
  local one, high, low = {}, 0, 0
  one.storing, one.digest, one.sha, one.partition, high, low, one.id, one.vector, one.probes, at =
    struct.unpack('>Bc16c16I4I2I4I4c0I4c0I4c0', ARGV[4], at)
  one.storing, one.offset = one.storing == 1, high * 4294967296 + low
  local outcome, sequence, text, origin = HELD, 0, '', 0
  if not waits[one.partition] then outcome, sequence, text, origin = decide(one) end
  if outcome >= MOVED then waits[one.partition] = true end
  text = text or ''
  answers[#answers + 1] =
    struct.pack('>BI8I8I4', outcome, sequence or 0, origin or 0, #text) .. text
end
if #inserts > 0 then
  write_lookups()
  write_records()
  write_clusters()
end
return {version, table.concat(answers), tails()}
