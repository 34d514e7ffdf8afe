package store

import (
	"bytes"
	"context"
	"fmt"
	"slices"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// A record keeps the closure hash of its path, and the epoch of its view when
// it was computed. It is that of what the view holds now if the view's epoch is
// still the same, because
//
//   - while a path is in a view, so is its closure: Delete and GC refuse what is
//     referred to, and a commit leases what it refers to from before the hash is
//     computed;
//   - what is in a view keeps its content, but for a repair. It raises the epoch
//     in the transaction that writes it, and until then (pending.replaced) no
//     closure hash of the view counts;
//   - a path that was uploaded and is not taken, because the view has got
//     another content for it meanwhile, takes the hashes of all that were
//     committed with it along (decision.request).
//
// A hash that is not known is computed from the records when it is needed.

// closureEpoch returns the epoch of a view; ok is false while closure hashes in
// it do not count. What the reader finds afterwards belongs to that epoch or to
// a later one.
func (r *reader) closureEpoch(a AccountID) (epoch uint64, ok bool) {
	r.s.pendingMu.RLock()
	replaced := r.s.pending.replaced[a]
	r.s.pendingMu.RUnlock()
	v := r.view(a)
	if replaced || v == nil || r.s.flushes.Load() != r.flushes {
		return 0, false
	}
	return v.epoch(), true
}

// closureHash returns the closure hash that is kept with a path; ok is false if
// none is.
func (r *reader) closureHash(a AccountID, p nixproto.StorePath, epoch uint64) (h sum, ok bool, err error) {
	rec, encoded, err := r.find(a, p)
	switch {
	case rec != nil && rec.epoch == epoch:
		h = rec.closure
	case rec == nil && encoded != nil:
		h = recordClosureHash(encoded, epoch)
	}
	return h, h != sum{}, err
}

// hashClosures gives the records of a burst their closure hashes, as far as
// those of what they refer to are known.
func (b *burst) hashClosures() error {
	if b.req.repair || len(b.req.paths) == 0 {
		return nil
	}
	r, err := b.s.newReader()
	if err != nil {
		return err
	}
	defer r.close()
	epoch, ok := r.closureEpoch(b.req.account)
	if !ok {
		return nil
	}
	others := make(map[nixproto.StorePath]sum) // of the view
	var failed error
	lookup := func(p nixproto.StorePath) (nixproto.ClosureHash, bool) {
		if rec := b.added[p]; rec != nil {
			return nixproto.ClosureHash(rec.closure), rec.closure != sum{}
		}
		h, seen := others[p]
		if !seen {
			var err error
			if h, _, err = r.closureHash(b.req.account, p, epoch); err != nil {
				failed = err
			}
			others[p] = h
		}
		return nixproto.ClosureHash(h), h != sum{}
	}
	// Almost always what a path refers to comes before it.
	for progress := true; progress && failed == nil; {
		var left bool
		progress = false
		for _, list := range [][]*record{b.req.adopted, b.req.paths} {
			for _, rec := range list {
				if rec.closure != (sum{}) {
					continue
				}
				h, err := rec.HashClosure(lookup)
				if err != nil { // of a reference it is not known, or not yet
					left = true
					continue
				}
				rec.closure, rec.epoch, progress = sum(h), epoch, true
			}
		}
		progress = progress && left
	}
	return failed
}

// InputRoots returns those of the paths in the closure of inputs that no other
// of them refers to, sorted, and their closure hashes. Together they stand for
// the whole closure, and they are the same whichever of its members are named
// as inputs (reuse.KeyOfRoots makes a key of them). In the own view a closure
// hash is kept with each path, so that this is far cheaper than to hash the
// closure. Inputs that may not be used are ErrNotFound.
func (v *Sight) InputRoots(ctx context.Context, inputs []nixproto.StorePath) (roots []nixproto.StorePath, hashes []nixproto.ClosureHash, err error) {
	chosen, err := v.choose(ctx, inputs)
	if err != nil {
		return nil, nil, err
	}
	h := &closureHasher{v: v, ctx: ctx, chosen: chosen, sums: make(map[nixproto.StorePath]nixproto.ClosureHash)}
	if roots, err = h.run(inputs); err != nil {
		return nil, nil, fmt.Errorf("hash closure of inputs: %w", err)
	}
	for _, p := range roots {
		hashes = append(hashes, h.sums[p])
	}
	return roots, hashes, h.remember()
}

// A closureHasher finds closure hashes, as one account sees them.
type closureHasher struct {
	v      *Sight
	ctx    context.Context
	chosen map[nixproto.StorePath]*choice
	r      *reader
	epoch  uint64
	known  bool // closure hashes in the own view count
	sums   map[nixproto.StorePath]nixproto.ClosureHash
	// computed are records of the own view whose closure hash was not known,
	// and deletions how many there had been before.
	computed  []*record
	deletions uint64
}

// run finds the roots among the closure of inputs, and their hashes.
func (h *closureHasher) run(inputs []nixproto.StorePath) (roots []nixproto.StorePath, err error) {
	h.deletions = h.v.s.deletions.Load()
	if h.r, err = h.v.s.newReader(); err != nil {
		return nil, err
	}
	defer h.r.close()
	h.epoch, h.known = h.r.closureEpoch(h.v.account)
	if roots, err = h.roots(inputs); err != nil {
		return nil, err
	}
	return roots, walk(h.ctx, roots, h.want, h.sum)
}

// roots returns the paths in the closure of inputs that no other refers to.
// They are inputs: all others are referred to.
func (h *closureHasher) roots(inputs []nixproto.StorePath) ([]nixproto.StorePath, error) {
	// Base names in the closure, and whether another one refers to them.
	referred := make(map[string]bool, 2*len(inputs))
	todo := make([]string, 0, len(inputs))
	for _, p := range inputs {
		if _, seen := referred[p.Base()]; !seen {
			referred[p.Base()] = false
			todo = append(todo, p.Base())
		}
	}
	roots := len(todo)
	named := roots // of todo, the inputs that are still to come
	var deeper []string
	for len(todo) > 0 {
		base := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		refer := func(ref []byte) error {
			is, seen := referred[string(ref)]
			if is || string(ref) == base {
				return nil
			}
			name := string(ref)
			referred[name] = true
			if seen {
				roots--
			} else {
				deeper = append(deeper, name)
			}
			return nil
		}
		if err := h.references(base, refer); err != nil {
			return nil, err
		}
		if named--; named > 0 {
			continue
		}
		// All inputs were looked at. Of the rest it matters only whether they
		// refer to an input that nothing has referred to yet.
		if roots == 1 || h.ctx.Err() != nil {
			break
		}
		todo, deeper = append(todo, deeper...), deeper[:0]
	}
	list := make([]nixproto.StorePath, 0, roots)
	for _, p := range inputs {
		if !referred[p.Base()] {
			list = append(list, p)
		}
	}
	slices.Sort(list)
	return slices.Compact(list), h.ctx.Err()
}

// references calls f with the base names that a path refers to.
func (h *closureHasher) references(base string, f func(ref []byte) error) error {
	p := nixproto.StorePath(storePrefix + base)
	rec, encoded, err := h.r.find(h.v.account, p)
	switch {
	case err != nil:
		return err
	case encoded != nil:
		return eachReference(encoded, f)
	case rec == nil && h.chosen[p] == nil:
		return fmt.Errorf("path %s: %w", p, ErrNotFound)
	case rec == nil:
		rec = h.chosen[p].rec
	}
	for _, ref := range rec.References {
		if err := f([]byte(ref.Base())); err != nil {
			return err
		}
	}
	return nil
}

// want returns the record of a path; without references if its hash is known.
func (h *closureHasher) want(p nixproto.StorePath) (*record, error) {
	if h.known {
		known, ok, err := h.r.closureHash(h.v.account, p, h.epoch)
		if err != nil {
			return nil, err
		}
		if ok {
			h.sums[p] = nixproto.ClosureHash(known)
			return &record{PathInfo: nixproto.PathInfo{Path: p}}, nil
		}
	}
	rec, err := h.r.get(h.v.account, p)
	switch {
	case err != nil:
		return nil, err
	case rec != nil:
		own := *rec // which may be pending
		h.computed = append(h.computed, &own)
		return &own, nil
	case h.chosen[p] != nil:
		return h.chosen[p].rec, nil
	}
	return nil, fmt.Errorf("path %s: %w", p, ErrNotFound)
}

// sum computes the hash of a path after those of what it refers to.
func (h *closureHasher) sum(r *record) {
	if _, known := h.sums[r.Path]; known {
		return
	}
	sum, err := r.HashClosure(func(p nixproto.StorePath) (nixproto.ClosureHash, bool) {
		s, ok := h.sums[p]
		return s, ok
	})
	if err == nil { // all it refers to came before
		h.sums[r.Path] = sum
	}
}

// rememberFrom is how many hashes have to be computed to be worth a
// transaction.
const rememberFrom = 64

// remember keeps computed hashes with their paths, if these are still the same.
func (h *closureHasher) remember() error {
	if !h.known || len(h.computed) < rememberFrom {
		return nil
	}
	return h.v.s.update(func(tx *bolt.Tx) error {
		v, err := openView(tx, h.v.account)
		if err != nil || v.epoch() != h.epoch || h.v.s.deletions.Load() != h.deletions {
			return err
		}
		for _, r := range h.computed {
			before, err := appendRecord(nil, r)
			if err != nil {
				return err
			}
			if !bytes.Equal(v.paths.Get([]byte(r.Path.Base())), before) {
				continue // its signatures, perhaps
			}
			r.closure, r.epoch = sum(h.sums[r.Path]), h.epoch
			after, err := appendRecord(nil, r)
			if err != nil {
				return err
			}
			if err := v.paths.Put([]byte(r.Path.Base()), after); err != nil {
				return err
			}
		}
		return nil
	})
}
