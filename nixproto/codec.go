package nixproto

import (
	"fmt"
	"maps"
	"slices"
)

// A Version is the version of a protocol: major<<8 | minor.
type Version uint16

// The versions nbd speaks. What a connection speaks is the lower one of what
// both sides offer.
const (
	MinWorker Version = 1<<8 | 32 // Nix 2.4
	MaxWorker Version = 1<<8 | 38 // Nix 2.24 to 2.34, and newer without features
	MinServe  Version = 2<<8 | 5  // Nix 2.3
	MaxServe  Version = 2<<8 | 7  // Nix 2.4 to 2.34
)

// Minor returns the version's second number.
func (v Version) Minor() int { return int(v & 0xff) }

// String returns the version as "1.38".
func (v Version) String() string { return fmt.Sprintf("%d.%d", v>>8, v.Minor()) }

// serve reports whether v belongs to the serve protocol; both protocols share
// some values but not their layouts.
func (v Version) serve() bool { return v>>8 == 2 }

// A codec goes through the fields of a message in the order of the wire and
// either reads or writes each of them, so that every layout stands in the code
// once. Exactly one of r and w is set.
type codec struct {
	r *Reader
	w *Writer
	v Version
}

func (c codec) reading() bool { return c.r != nil }

// failed reports that a reader broke; loops over counts end then.
func (c codec) failed() bool { return c.r != nil && c.r.err != nil }

func (c codec) u64(p *uint64) {
	if c.r != nil {
		*p = c.r.u64()
	} else {
		c.w.Uint64(*p)
	}
}

func (c codec) i64(p *int64) {
	if c.r != nil {
		*p = int64(c.r.u64())
	} else {
		c.w.Uint64(uint64(*p))
	}
}

func (c codec) bool(p *bool) {
	if c.r != nil {
		*p = c.r.u64() != 0
	} else {
		c.w.Bool(*p)
	}
}

// constant writes v; what is read in its place must be v.
func (c codec) constant(v uint64, what string) {
	if c.r == nil {
		c.w.Uint64(v)
	} else if got := c.r.u64(); got != v {
		c.r.malformed("%s is %d instead of %d", what, got, v)
	}
}

// unused writes v and takes anything in its place.
func (c codec) unused(v uint64) { c.u64(&v) }

func (c codec) str(p *string, max int) {
	if c.r != nil {
		*p = c.r.str(max)
	} else {
		c.w.Str(*p)
	}
}

func (c codec) bytes(p *[]byte, max int) {
	if c.r != nil {
		*p = c.r.bytes(max)
	} else {
		c.w.Bytes(*p)
	}
}

func (c codec) strings(p *[]string) {
	if c.r != nil {
		*p = c.r.list(maxItems, MaxMessage)
	} else {
		c.w.Strings(*p)
	}
}

func (c codec) stringSet(p *[]string) {
	if c.r != nil {
		*p = c.r.set(maxSmall)
	} else {
		c.w.Strings(ordered(*p))
	}
}

func (c codec) stringMap(p *map[string]string) {
	if c.r != nil {
		*p = c.r.stringMap()
	} else {
		c.w.StringMap(*p)
	}
}

func (c codec) path(p *StorePath) {
	if c.r != nil {
		*p = c.r.path()
	} else {
		c.w.Path(*p)
	}
}

func (c codec) optPath(p *StorePath) {
	if c.r != nil {
		*p = c.r.optPath()
	} else {
		c.w.Path(*p)
	}
}

func (c codec) paths(p *[]StorePath) {
	if c.r != nil {
		*p = c.r.paths()
	} else {
		c.w.Paths(ordered(*p))
	}
}

// pathMap is a map from store paths to texts, or from texts to store paths that
// may be empty; key and value go over one item.
func pathMap[K, V ~string](c codec, p *map[K]V, key func(*K), value func(*V)) {
	if c.r == nil {
		c.w.Uint64(uint64(len(*p)))
		for _, k := range slices.Sorted(maps.Keys(*p)) {
			v := (*p)[k]
			key(&k)
			value(&v)
		}
		return
	}
	*p = map[K]V{}
	for range c.r.count(maxItems, entryCost) {
		var k K
		var v V
		key(&k)
		value(&v)
		if c.failed() {
			return
		}
		(*p)[k] = v
	}
}

// items goes over a list whose items are made of several fields.
func items[T any](c codec, p *[]T, fields func(*T)) {
	if c.r == nil {
		c.w.Uint64(uint64(len(*p)))
		for i := range *p {
			fields(&(*p)[i])
		}
		return
	}
	*p = nil
	for range c.r.count(maxItems, structCost) {
		var item T
		fields(&item)
		if c.failed() {
			return
		}
		*p = append(*p, item)
	}
}

// ordered returns the items of a set in the order of the wire.
func ordered[T ~string](s []T) []T {
	if slices.IsSorted(s) {
		return s
	}
	return sortedSet(slices.Clone(s))
}
