package store

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"nbd/nixproto"
)

// A Registration is one path that becomes valid.
type Registration struct {
	// Info describes the path. With Staged, NarHash and NarSize are taken from
	// it and may be left zero. A zero RegistrationTime is the present.
	Info nixproto.PathInfo
	// Staged holds the content; nil if the blob NarHash is stored already.
	Staged *Staged
}

// Register makes the paths valid in the account's view, all at once and
// durable. What they refer to must be valid in the view or be registered
// along, without a cycle; content addresses must recompute (both ErrInvalid).
// A path that the view has already keeps its record. That the account may have
// a blob that is stored already is the caller's to know; ErrNotFound if it is
// not stored. The Staged are used up, whatever the outcome.
func (s *Store) Register(ctx context.Context, a AccountID, regs []Registration) error {
	return s.register(ctx, s.NewSight(a, Trust{}), regs)
}

func (s *Store) register(ctx context.Context, v *Sight, regs []Registration) error {
	defer func() {
		for _, r := range regs {
			if r.Staged != nil {
				r.Staged.Discard()
			}
		}
	}()
	if err := errors.Join(ctx.Err(), s.checkAccount(v.account)); err != nil {
		return err
	}
	b := s.newBurst(v)
	defer b.end()
	recs, lent, err := s.registerRecords(ctx, b, regs)
	if err != nil {
		return err
	}
	for i, r := range recs {
		if err := s.registerOne(b, r, lent, regs[i].Staged); err != nil {
			return fmt.Errorf("register %s: %w", r.Path, err)
		}
		lent = nil // the first path brings them for all
	}
	return b.commit()
}

// registerRecords makes the records, and checks that they refer to what is
// valid or lent. It returns the records of what is lent as well.
func (s *Store) registerRecords(ctx context.Context, b *burst, regs []Registration) (recs, lent []*record, err error) {
	recs = make([]*record, len(regs))
	var all []nixproto.StorePath // references
	refs := make(map[nixproto.StorePath][]nixproto.StorePath)
	for i := range regs {
		r := &record{PathInfo: regs[i].Info}
		r.References = slices.Compact(slices.Sorted(slices.Values(r.References)))
		if r.RegistrationTime == 0 {
			r.RegistrationTime = s.cfg.Now().Unix()
		}
		if st := regs[i].Staged; st != nil {
			if !st.done || st.err != nil || st.used {
				return nil, nil, fmt.Errorf("register %s: its NAR is not finished", r.Path)
			}
			r.NarHash, r.NarSize = st.NarHash(), st.NarSize()
		}
		if refs[r.Path] != nil {
			return nil, nil, fmt.Errorf("register %s: %w: twice", r.Path, ErrInvalid)
		}
		all = append(all, r.References...)
		refs[r.Path] = append([]nixproto.StorePath{}, r.References...)
		b.lease.Add(r.Path)
		b.lease.Add(r.References...)
		recs[i] = r
	}
	lent, missing, err := b.references(ctx, all, func(p nixproto.StorePath) bool { return refs[p] != nil })
	if err != nil {
		return nil, nil, err
	}
	if missing != "" {
		i := slices.IndexFunc(recs, func(r *record) bool { return slices.Contains(r.References, missing) })
		return nil, nil, fmt.Errorf("register %s: %w reference: %s is not valid", recs[max(i, 0)].Path, ErrInvalid, missing)
	}
	for _, l := range lent {
		refs[l.Path] = append([]nixproto.StorePath{}, l.References...)
	}
	return recs, lent, checkAcyclic(refs)
}

// checkAcyclic returns an error if a path refers to itself by way of others.
func checkAcyclic(refs map[nixproto.StorePath][]nixproto.StorePath) error {
	users := make(map[nixproto.StorePath][]nixproto.StorePath)
	waits := make(map[nixproto.StorePath]int)
	var ready []nixproto.StorePath
	for p, to := range refs {
		for _, r := range to {
			if r != p && refs[r] != nil {
				users[r] = append(users[r], p)
				waits[p]++
			}
		}
		if waits[p] == 0 {
			ready = append(ready, p)
		}
	}
	for len(ready) > 0 {
		p := ready[len(ready)-1]
		ready = ready[:len(ready)-1]
		for _, user := range users[p] {
			if waits[user]--; waits[user] == 0 {
				delete(waits, user)
				ready = append(ready, user)
			}
		}
	}
	for p := range waits {
		return fmt.Errorf("register %s: %w references: they form a cycle", p, ErrInvalid)
	}
	return nil
}

// registerOne adds one path with its blob to the burst, and what is lent.
func (s *Store) registerOne(b *burst, r *record, lent []*record, st *Staged) error {
	h, err := sumOf(r.NarHash)
	if err != nil {
		return err
	}
	check, err := newContentCheck(r)
	if err != nil {
		return err
	}
	b.pin(h)
	stored, damaged, err := b.stored(h)
	if err != nil {
		return err
	}
	if st == nil {
		if err := s.checkStored(check, h); err != nil {
			return err
		}
		return b.addPath(r, lent)
	}
	if err := check.read(st, st.Index()); err != nil {
		return err
	}
	if err := b.addPath(r, lent); err != nil {
		return err
	}
	if f := st.file; f != nil {
		st.file, st.used = nil, true
		if stored {
			return b.addSpare(h, f)
		}
		return b.addFile(h, f, st.Index(), damaged)
	}
	if stored {
		return nil
	}
	start := b.beginFrame()
	b.req.frames = append(b.req.frames, st.mem...)
	return b.endFrame(start, h, st.Index(), damaged)
}

// checkStored checks a record against the pinned blob h, which is stored.
func (s *Store) checkStored(check *contentCheck, h sum) error {
	blob, err := s.openPinned(h)
	if err != nil {
		return err
	}
	defer blob.Close()
	if size := check.rec.NarSize; size != uint64(blob.Size()) {
		return fmt.Errorf("%w NAR size: claimed %d, it is %d", ErrInvalid, size, blob.Size())
	}
	x, err := blob.Index()
	if err != nil {
		return err
	}
	return check.read(blob, x)
}
