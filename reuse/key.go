package reuse

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"

	"nbd/nixproto"
)

// keyTag separates keys from other hashes and from those of other versions.
// Raise the number with any change of what is hashed: it makes all stored
// results unreachable. So does a change of nixproto.ClosureHash.
const keyTag = "nbd build key 1"

// A Key names a build by everything that its builder sees.
type Key [sha256.Size]byte

// String returns the key in hexadecimal.
func (k Key) String() string { return hex.EncodeToString(k[:]) }

// Variant returns the key of the same build done in another way that changes
// its outputs. Different ways have different names; the way that NewKey means
// has none.
func (k Key) Variant(way string) Key {
	return sha256.Sum256(append(k[:], way...))
}

// ParseKey reads what String wrote.
func ParseKey(s string) (Key, error) {
	var k Key
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(k) {
		return k, fmt.Errorf("parse build key: want %d hexadecimal digits", 2*len(k))
	}
	copy(k[:], b)
	return k, nil
}

// A ClosureHash names the contents of a store path together with that of all
// paths it refers to.
type ClosureHash = nixproto.ClosureHash

// HashPath returns the closure hash of a path; see PathInfo.HashClosure.
func HashPath(info *nixproto.PathInfo, refs func(nixproto.StorePath) (ClosureHash, bool)) (ClosureHash, error) {
	return info.HashClosure(refs)
}

// sortedRefs returns the references of info in order and each once; that is
// how most come.
func sortedRefs(info *nixproto.PathInfo) []nixproto.StorePath {
	for i, r := range info.References {
		if i > 0 && r <= info.References[i-1] {
			return slices.Compact(slices.Sorted(slices.Values(info.References)))
		}
	}
	return info.References
}

// NewKey returns the key of building drv, which must be resolved (no
// InputDrvs), with the given closure of its inputs: the paths of drv.InputSrcs
// and all they refer to, each once, in any order.
//
// drv.InputSrcs itself is no part of the key. A builder sees the closure and
// cannot tell which of its members were named; a client that sends one
// derivation names all of them where a .drv file names the direct inputs, and
// both are the same build.
func NewKey(drv *nixproto.Derivation, closure []*nixproto.PathInfo) (Key, error) {
	if len(drv.InputDrvs) > 0 {
		return Key{}, fmt.Errorf("key of %s: inputs are not resolved", drv.Name)
	}
	roots, err := closureRoots(closure)
	if err != nil {
		return Key{}, fmt.Errorf("key of %s: %w", drv.Name, err)
	}
	return KeyOfRoots(drv, roots)
}

// KeyOfRoots is NewKey for a closure of which only the roots are given: the
// closure hashes of those of its paths that no other path of it refers to,
// ordered by path (store.Sight.InputRoots). They stand for the whole closure.
func KeyOfRoots(drv *nixproto.Derivation, roots []ClosureHash) (Key, error) {
	if len(drv.InputDrvs) > 0 {
		return Key{}, fmt.Errorf("key of %s: inputs are not resolved", drv.Name)
	}
	var h hasher
	h.str(keyTag)
	h.str(drv.Name)
	h.derivation(drv)
	h.num(uint64(len(roots)))
	for _, r := range roots {
		h.raw(r[:])
	}
	return Key(h.sum()), nil
}

// closureRoots returns the closure hashes of the paths that no other path of
// the closure refers to, ordered by path. Together they stand for the whole
// closure, and they are the same whichever members were named as inputs.
func closureRoots(closure []*nixproto.PathInfo) ([]ClosureHash, error) {
	g, err := newGraph(closure)
	if err != nil {
		return nil, err
	}
	if err := g.hash(); err != nil {
		return nil, err
	}
	var roots []int
	for i := range g.infos {
		if len(g.users[i]) == 0 {
			roots = append(roots, i)
		}
	}
	slices.SortFunc(roots, func(i, j int) int { return cmp.Compare(g.infos[i].Path, g.infos[j].Path) })
	sums := make([]ClosureHash, len(roots))
	for i, n := range roots {
		sums[i] = g.sums[n]
	}
	return sums, nil
}

// A graph is a closure whose paths are numbered.
type graph struct {
	infos   []*nixproto.PathInfo
	numbers map[nixproto.StorePath]int
	users   [][]int // who refers to a path, but for itself
	waits   []int   // how many references of a path are not hashed yet
	sums    []ClosureHash
	hashed  []bool
}

func newGraph(closure []*nixproto.PathInfo) (*graph, error) {
	g := &graph{
		infos:   closure,
		numbers: make(map[nixproto.StorePath]int, len(closure)),
		users:   make([][]int, len(closure)),
		waits:   make([]int, len(closure)),
		sums:    make([]ClosureHash, len(closure)),
		hashed:  make([]bool, len(closure)),
	}
	for i, info := range closure {
		if _, twice := g.numbers[info.Path]; twice {
			return nil, fmt.Errorf("closure has %s twice", info.Path)
		}
		g.numbers[info.Path] = i
	}
	for i, info := range closure {
		for _, r := range sortedRefs(info) {
			if r == info.Path {
				continue
			}
			n, ok := g.numbers[r]
			if !ok {
				return nil, fmt.Errorf("closure has %s and not its reference %s", info.Path, r)
			}
			g.users[n] = append(g.users[n], i)
			g.waits[i]++
		}
	}
	return g, nil
}

// hash computes the closure hash of each path, references first.
func (g *graph) hash() error {
	var ready []int
	for i, n := range g.waits {
		if n == 0 {
			ready = append(ready, i)
		}
	}
	lookup := func(p nixproto.StorePath) (ClosureHash, bool) {
		n := g.numbers[p]
		return g.sums[n], g.hashed[n]
	}
	done := 0
	for ; len(ready) > 0; done++ {
		n := ready[len(ready)-1]
		ready = ready[:len(ready)-1]
		sum, err := HashPath(g.infos[n], lookup)
		if err != nil {
			return err
		}
		g.sums[n], g.hashed[n] = sum, true
		for _, u := range g.users[n] {
			if g.waits[u]--; g.waits[u] == 0 {
				ready = append(ready, u)
			}
		}
	}
	if done != len(g.infos) {
		return errors.New("references of the closure go round in a circle")
	}
	return nil
}

// A hasher collects fields that cannot run into one another: numbers are eight
// bytes, strings carry their length.
type hasher []byte

func (h *hasher) num(n uint64) { *h = binary.LittleEndian.AppendUint64(*h, n) }
func (h *hasher) raw(b []byte) { *h = append(*h, b...) }
func (h *hasher) str(s string) {
	h.num(uint64(len(s)))
	*h = append(*h, s...)
}

// derivation adds everything of drv but its name and inputs.
func (h *hasher) derivation(drv *nixproto.Derivation) {
	h.num(uint64(len(drv.Outputs)))
	for _, name := range slices.Sorted(maps.Keys(drv.Outputs)) {
		out := drv.Outputs[name]
		h.str(name)
		h.str(string(out.Path))
		h.str(out.HashAlgo)
		h.str(out.Hash)
	}
	h.str(drv.System)
	h.str(drv.Builder)
	h.num(uint64(len(drv.Args)))
	for _, a := range drv.Args {
		h.str(a)
	}
	h.num(uint64(len(drv.Env)))
	for _, name := range slices.Sorted(maps.Keys(drv.Env)) {
		h.str(name)
		h.str(drv.Env[name])
	}
}

func (h hasher) sum() [sha256.Size]byte { return sha256.Sum256(h) }
