package nixproto

import "encoding/binary"

// A hashPart is the 32 characters that identify a store path.
type hashPart [HashPartLen]byte

// forEachHashPart calls found, in order, with the offset of every window of b
// that is 32 characters of nix32 and may be known to set. It looks at the last
// character of a window first: in anything but text it is mostly none of
// nix32's, and the next 31 windows hold it too.
func forEachHashPart(b []byte, set *partFilter, found func(at int)) {
	at := 0
	for at+HashPartLen <= len(b) {
		end := at + HashPartLen
		i := end - 1
		for i >= at && nix32Values[b[i]] != noNix32 {
			i--
		}
		if i >= at {
			at = i + 1
			continue
		}
		// A whole window: go on character by character until the run ends.
		for {
			if at = end - HashPartLen; set.has(b[at:]) {
				found(at)
			}
			if end == len(b) {
				return
			}
			if nix32Values[b[end]] == noNix32 {
				break
			}
			end++
		}
		at = end + 1
	}
}

// A partFilter tells most hash parts that are not in a set from those that are:
// a Bloom filter in which eight characters of a hash part choose two bits of a
// word, with a word for each four of the set. Hexadecimal or base 64 text would
// otherwise cost a map's look-up for each character.
type partFilter struct {
	words []uint64
	shift uint
}

func newPartFilter(n int) partFilter {
	size := uint(0)
	for 4<<size < n {
		size++
	}
	return partFilter{make([]uint64, 1<<size), 64 - size}
}

// slot returns the word and the bits of the hash part that b begins with.
func (f *partFilter) slot(b []byte) (word int, bits uint64) {
	h := binary.LittleEndian.Uint64(b[12:]) * 0x9e3779b97f4a7c15
	return int(h >> f.shift), 1<<(h>>24&63) | 1<<(h>>30&63)
}

func (f *partFilter) add(b []byte) {
	word, bits := f.slot(b)
	f.words[word] |= bits
}

func (f *partFilter) has(b []byte) bool {
	word, bits := f.slot(b)
	return f.words[word]&bits == bits
}

// A Scanner finds which of a set of store paths occur in a stream of bytes, by
// their hash parts alone, as Nix scans outputs for references. It is an
// io.Writer that never fails; hash parts may straddle writes. It is used by one
// goroutine at a time.
type Scanner struct {
	paths  []StorePath
	index  map[hashPart]int32 // into found
	found  []bool
	filter partFilter
	tail   []byte // the end of earlier writes, one byte less than a hash part
}

// NewScanner returns a Scanner for those paths, which may be very many.
func NewScanner(paths []StorePath) *Scanner {
	s := &Scanner{
		paths:  paths,
		index:  make(map[hashPart]int32, len(paths)),
		found:  make([]bool, len(paths)),
		filter: newPartFilter(len(paths)),
		tail:   make([]byte, 0, 2*HashPartLen),
	}
	for i, p := range paths {
		part := hashPart([]byte(p.HashPart()))
		if _, twice := s.index[part]; !twice {
			s.index[part] = int32(i)
		}
		s.filter.add(part[:])
	}
	return s
}

// Write scans b.
func (s *Scanner) Write(b []byte) (int, error) {
	// First what straddles the last write and this one, then b itself.
	straddling := append(s.tail, b[:min(len(b), HashPartLen-1)]...)
	s.scan(straddling)
	s.scan(b)
	rest := straddling
	if len(b) >= HashPartLen-1 {
		rest = b
	}
	rest = rest[max(0, len(rest)-HashPartLen+1):]
	s.tail = s.tail[:copy(s.tail[:cap(s.tail)], rest)]
	return len(b), nil
}

func (s *Scanner) scan(b []byte) {
	forEachHashPart(b, &s.filter, func(at int) {
		if i, ok := s.index[hashPart(b[at:])]; ok {
			s.found[i] = true
		}
	})
}

// Found returns the paths that occurred so far, in the order in which NewScanner
// got them. Of several with the same hash part it returns all.
func (s *Scanner) Found() []StorePath {
	var found []StorePath
	for _, p := range s.paths {
		if s.found[s.index[hashPart([]byte(p.HashPart()))]] {
			found = append(found, p)
		}
	}
	return found
}
