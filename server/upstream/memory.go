package upstream

import (
	"container/list"
	"sync"
	"time"

	"nbd/nixproto"
)

// A memory keeps answers of caches until they are too old, or until others need
// the room; then what was used least recently goes first.
type memory struct {
	now func() time.Time
	max int

	mu      sync.Mutex // guards what follows
	entries map[memoryKey]*list.Element
	order   *list.List // of *memoryEntry, the last used first
	size    int
}

// maxMemory is how much a Client remembers, in bytes, roughly.
const maxMemory = 32 << 20

// entrySize is what an entry takes beside its narinfo, in bytes, roughly.
const entrySize = 400

// A memoryKey is one question to one cache: a store path, or "" for what the
// cache says of itself.
type memoryKey struct {
	cache cacheKey
	path  string
}

// remembered is one answer.
type remembered struct {
	info  *nixproto.NarInfo
	cache *nixproto.CacheInfo
	err   error
}

type memoryEntry struct {
	remembered
	key   memoryKey
	until time.Time
	size  int
}

func newMemory(maxSize int, now func() time.Time) *memory {
	return &memory{now: now, max: maxSize, entries: make(map[memoryKey]*list.Element), order: list.New()}
}

// get returns what is remembered.
func (m *memory) get(key memoryKey) (remembered, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	el := m.entries[key]
	if el == nil {
		return remembered{}, false
	}
	e := el.Value.(*memoryEntry)
	if !m.now().Before(e.until) {
		m.dropLocked(el)
		return remembered{}, false
	}
	m.order.MoveToFront(el)
	return e.remembered, true
}

// put remembers an answer for a while; size is that of its text, in bytes.
func (m *memory) put(key memoryKey, r remembered, size int, keep time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if el := m.entries[key]; el != nil {
		m.dropLocked(el)
	}
	e := &memoryEntry{r, key, m.now().Add(keep), 2*size + entrySize}
	if e.size > m.max/4 {
		return
	}
	m.entries[key] = m.order.PushFront(e)
	m.size += e.size
	for m.size > m.max {
		m.dropLocked(m.order.Back())
	}
}

func (m *memory) dropLocked(el *list.Element) {
	e := m.order.Remove(el).(*memoryEntry)
	delete(m.entries, e.key)
	m.size -= e.size
}
