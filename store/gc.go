package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// GCOptions bound a collection of one view. The zero value deletes all that
// nobody uses.
type GCOptions struct {
	// OlderThan keeps paths, with their closures, that became valid less than
	// this long ago.
	OlderThan time.Duration
	// MaxFreed ends the collection once that many bytes of NARs were deleted;
	// 0 means no limit.
	MaxFreed uint64
	// DryRun reports what would be deleted, and deletes nothing.
	DryRun bool
	// Live reports what is alive instead; nothing is deleted.
	Live bool
}

// GCResult says what a collection or deletion did.
type GCResult struct {
	Paths []nixproto.StorePath // deleted, or that would be
	Freed uint64               // bytes of their NARs, as if nothing were shared
}

// gcBatch is how many paths one transaction deletes, so that nobody waits long.
const gcBatch = 500

// Delete removes paths from the view. If others than those refer to one of
// them, or it is leased, nothing is removed and the error is ErrInUse and
// names it. Paths that are not in the view are ErrNotFound. Bytes that
// nobody has any more go at the next Sweep.
//
// Who refers to them is looked for in the whole view, while others go on;
// commits meanwhile say what they refer to.
func (s *Store) Delete(ctx context.Context, a AccountID, paths ...nixproto.StorePath) (GCResult, error) {
	paths = slices.Compact(slices.Sorted(slices.Values(paths)))
	c := s.beginCollection(a)
	defer s.endCollection(c)
	err := s.readView(a, func(v *view) error { return s.deletable(ctx, v, paths) })
	var res GCResult
	if err == nil {
		res, err = s.deleteAll(c, paths)
	}
	if err != nil {
		return GCResult{}, fmt.Errorf("delete: %w", err)
	}
	return res, nil
}

// deletable says why paths cannot be deleted together.
func (s *Store) deletable(ctx context.Context, v *view, paths []nixproto.StorePath) error {
	set := make(map[string]bool)
	for _, p := range paths {
		if _, err := v.want(p); err != nil {
			return err
		}
		if s.leases.leased(v.account, p) { // spares the rest
			return fmt.Errorf("%s is %w", p, ErrInUse)
		}
		set[p.Base()] = true
	}
	return v.each(func(p nixproto.StorePath, rec []byte) error {
		err := eachReference(rec, func(base []byte) error {
			if set[string(base)] && !set[p.Base()] {
				return fmt.Errorf("%s%s is %w: %s refers to it", storePrefix, base, ErrInUse, p)
			}
			return nil
		})
		return errors.Join(err, ctx.Err())
	})
}

// deleteAll deletes paths to which others did not refer when the collection
// began, or none of them.
func (s *Store) deleteAll(c *collection, paths []nixproto.StorePath) (res GCResult, err error) {
	s.leases.deleting.Lock()
	defer s.leases.deleting.Unlock()
	err = s.update(func(tx *bolt.Tx) error {
		v, err := s.writeView(tx, c.account)
		if err != nil {
			return err
		}
		for _, p := range paths {
			if c.used[p] {
				return fmt.Errorf("%s is %w: something that was just added refers to it", p, ErrInUse)
			}
			if s.leases.leased(c.account, p) {
				return fmt.Errorf("%s is %w", p, ErrInUse)
			}
			if err := v.collect(p, &res); err != nil {
				return err
			}
		}
		s.deletions.Add(1)
		return nil
	})
	return res, err
}

// collect removes a path that is in the view and counts it.
func (v *view) collect(p nixproto.StorePath, res *GCResult) error {
	r, err := v.want(p)
	if err != nil {
		return err
	}
	res.Paths = append(res.Paths, p)
	res.Freed += r.NarSize
	return v.removeRecord(r)
}

// GC deletes from the view what is neither leased nor kept by the options nor
// referred to by what is. Realisations of paths that are gone go too.
//
// Paths that are used or referred to while it runs stay: commits and leases are
// looked at again before each path goes.
func (s *Store) GC(ctx context.Context, a AccountID, opts GCOptions) (GCResult, error) {
	s.gcMu.Lock()
	defer s.gcMu.Unlock()
	c := s.beginCollection(a)
	defer s.endCollection(c)
	var live, dead []*record
	err := s.readView(a, func(v *view) (err error) {
		live, dead, err = s.judge(ctx, v, opts)
		return err
	})
	if err != nil {
		return GCResult{}, fmt.Errorf("collect: %w", err)
	}
	if opts.Live || opts.DryRun {
		var res GCResult
		if opts.Live {
			dead = live
		}
		for _, r := range dead {
			if opts.DryRun && opts.MaxFreed > 0 && res.Freed >= opts.MaxFreed {
				break
			}
			res.Paths = append(res.Paths, r.Path)
			if !opts.Live {
				res.Freed += r.NarSize
			}
		}
		return res, nil
	}
	return s.deleteDead(ctx, c, dead, opts.MaxFreed)
}

// A collection is what commits tell a GC or Delete that is under way; guarded
// by commitMu.
type collection struct {
	account AccountID
	// used are the paths that commits referred to, and those that these and
	// new leases keep.
	used map[nixproto.StorePath]bool
}

// beginCollection makes commits tell what they refer to until endCollection.
func (s *Store) beginCollection(a AccountID) *collection {
	c := &collection{a, make(map[nixproto.StorePath]bool)}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.collections == nil {
		s.collections = make(map[*collection]bool)
	}
	s.collections[c] = true
	return c
}

func (s *Store) endCollection(c *collection) {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	delete(s.collections, c)
}

// noteLocked notes what a commit refers to.
func (s *Store) noteLocked(x *batch) {
	for c := range s.collections {
		for _, p := range x.paths {
			if p.account != c.account {
				continue
			}
			for _, ref := range p.rec.References {
				c.used[ref] = true
			}
		}
	}
}

// judge returns what is alive and what is not; what refers to another path
// comes before it.
func (s *Store) judge(ctx context.Context, v *view, opts GCOptions) (live, dead []*record, err error) {
	var all, keep []nixproto.StorePath
	young := s.cfg.Now().Add(-opts.OlderThan).Unix()
	err = v.each(func(p nixproto.StorePath, b []byte) error {
		r, err := decodeRecord(p, b)
		if err != nil {
			return err
		}
		all = append(all, p)
		if opts.OlderThan > 0 && r.RegistrationTime > young {
			keep = append(keep, p)
		}
		return ctx.Err()
	})
	if err != nil {
		return nil, nil, err
	}
	for _, p := range s.leases.of(v.account) {
		if v.has(p) {
			keep = append(keep, p)
		}
	}
	alive := make(map[nixproto.StorePath]bool)
	err = v.closure(ctx, keep, func(r *record) {
		alive[r.Path] = true
		live = append(live, r)
	})
	if err != nil {
		return nil, nil, err
	}
	err = v.closure(ctx, all, func(r *record) {
		if !alive[r.Path] {
			dead = append(dead, r)
		}
	})
	slices.Reverse(live)
	slices.Reverse(dead)
	return live, dead, err
}

// deleteDead deletes paths that are still not in use. Each comes after those
// that refer to it.
func (s *Store) deleteDead(ctx context.Context, c *collection, dead []*record, maxFreed uint64) (GCResult, error) {
	var res GCResult
	for batch := range slices.Chunk(dead, gcBatch) {
		if err := ctx.Err(); err != nil {
			return res, err
		}
		if maxFreed > 0 && res.Freed >= maxFreed {
			break
		}
		got, err := s.deleteBatch(c, batch, maxFreed-min(res.Freed, maxFreed))
		if err != nil {
			return res, fmt.Errorf("collect: %w", err)
		}
		res.Paths = append(res.Paths, got.Paths...)
		res.Freed += got.Freed
	}
	return res, s.dropRealisations(c.account)
}

// deleteBatch deletes those of batch that nobody has begun to use, until
// maxFreed bytes are freed unless it is 0.
func (s *Store) deleteBatch(c *collection, batch []*record, maxFreed uint64) (res GCResult, err error) {
	s.leases.deleting.Lock()
	defer s.leases.deleting.Unlock()
	err = s.update(func(tx *bolt.Tx) error {
		v, err := s.writeView(tx, c.account)
		if err != nil {
			return err
		}
		s.deletions.Add(1)
		for _, r := range batch {
			if maxFreed > 0 && res.Freed >= maxFreed {
				return nil
			}
			if c.used[r.Path] || s.leases.leased(c.account, r.Path) {
				for _, ref := range r.References { // they come later
					c.used[ref] = true
				}
				continue
			}
			now, err := v.get(r.Path)
			if err != nil {
				return err
			}
			if now == nil || now.NarHash != r.NarHash {
				continue // deleted or repaired meanwhile
			}
			if err := v.collect(r.Path, &res); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return GCResult{}, err
	}
	return res, nil
}

// dropRealisations removes the realisations of paths that are not in the view.
func (s *Store) dropRealisations(a AccountID) error {
	var gone [][]byte
	dead := func(v *view, b []byte) bool {
		r, err := nixproto.ParseRealisation(b[min(1, len(b)):])
		return err != nil || !v.has(r.OutPath)
	}
	err := s.readView(a, func(v *view) error {
		return v.realisations().ForEach(func(k, b []byte) error {
			if dead(v, b) {
				gone = append(gone, slices.Clone(k))
			}
			return nil
		})
	})
	if err != nil || len(gone) == 0 {
		return err
	}
	return s.update(func(tx *bolt.Tx) error {
		v, err := openView(tx, a)
		if err != nil {
			return err
		}
		for _, k := range gone {
			b := v.realisations().Get(k)
			if b == nil || !dead(v, b) { // the path came back
				continue
			}
			if err := v.realisations().Delete(k); err != nil {
				return err
			}
		}
		return nil
	})
}
