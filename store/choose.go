package store

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"nbd/nixproto"
)

// How a path of another view is chosen: those who may lend it are asked in
// order, and the first record of which the whole closure may be used is taken.
// Own paths always may: their closure is in the own view. So do those of linked
// accounts: each path of their closure is there as well, or chosen from one
// before. What is only signed may lack paths, or, if a trusted key signed
// nonsense, go round in a circle; both mean that it is not there.

// A choice is the record of a path as it is lent.
type choice struct {
	rec *record
	sum sum
}

// maxChoosing bounds how often a choice is tried again that others have spoilt
// meanwhile, by deleting what was about to be chosen.
const maxChoosing = 10

// lentOne returns the record of a path that is not in the own view, if it may
// be used; else nil.
func (v *Sight) lentOne(ctx context.Context, p nixproto.StorePath) (*record, error) {
	lent, err := v.lent(ctx, []nixproto.StorePath{p})
	if c := lent[p]; c != nil {
		return c.rec, nil
	}
	return nil, err
}

// lent returns the choices for those of paths, and perhaps of others, that may
// be used; none of them is in the own view.
func (v *Sight) lent(ctx context.Context, paths []nixproto.StorePath) (map[nixproto.StorePath]*choice, error) {
	if v.alone || len(paths) == 0 {
		return nil, nil
	}
	lent := make(map[nixproto.StorePath]*choice)
	var rest []nixproto.StorePath
	v.mu.Lock()
	v.forgetRemovedLocked()
	for _, p := range paths {
		if c := v.choices[p]; c != nil {
			lent[p] = c
		} else {
			rest = append(rest, p)
		}
	}
	v.mu.Unlock()
	if len(rest) == 0 {
		return lent, nil
	}
	more, err := v.choose(ctx, rest)
	for p, c := range more {
		lent[p] = c
	}
	return lent, err
}

// choose returns the choices for all paths in the closures of those of roots
// that may be used and are not in the own view, as far as these are not in the
// own view themselves.
func (v *Sight) choose(ctx context.Context, roots []nixproto.StorePath) (map[nixproto.StorePath]*choice, error) {
	if v.alone {
		return nil, nil
	}
	for range maxChoosing {
		c := &choosing{
			v: v, ctx: ctx, removals: v.s.removals.Load(), found: make(map[nixproto.StorePath]*choice),
			own: make(map[nixproto.StorePath]bool), open: make(map[nixproto.StorePath]bool),
		}
		if err := c.all(roots); err != nil {
			return nil, err
		}
		if len(c.found) == 0 {
			return nil, nil
		}
		ok, err := c.settle()
		if ok || err != nil {
			return c.found, err
		}
	}
	return nil, fmt.Errorf("choose content of %d paths: what others lend changes too fast", len(roots))
}

// A choosing is one attempt to choose. It looks at everything first, and takes
// hold of what it has chosen then.
type choosing struct {
	v        *Sight
	ctx      context.Context
	r        *reader
	removals uint64 // when it began
	// found are the choices so far; nil for a path that may not be used.
	found map[nixproto.StorePath]*choice
	own   map[nixproto.StorePath]bool // of the own view, that choices refer to
	open  map[nixproto.StorePath]bool // whose closure is being looked at
}

// A trial is a path whose candidates are being looked at: candidate, and its
// references from ref on.
type trial struct {
	path           nixproto.StorePath
	candidates     []*choice
	candidate, ref int
}

// all chooses for roots and their closures.
func (c *choosing) all(roots []nixproto.StorePath) (err error) {
	c.v.mu.Lock()
	c.v.forgetRemovedLocked()
	c.v.mu.Unlock()
	if c.r, err = c.v.s.newReader(); err != nil {
		return err
	}
	defer c.r.close()
	for _, p := range roots {
		if _, known := c.found[p]; known {
			continue
		}
		if own, err := c.r.has(c.v.account, p); own || err != nil {
			if err != nil {
				return err
			}
			continue
		}
		if err := c.root(p); err != nil {
			return err
		}
	}
	for p, choice := range c.found {
		if choice == nil {
			delete(c.found, p)
		}
	}
	return nil
}

// root chooses for a path that is not in the own view, and its closure.
func (c *choosing) root(p nixproto.StorePath) error {
	first, err := c.try(p)
	if err != nil {
		return err
	}
	stack := []*trial{first}
	for len(stack) > 0 {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		t := stack[len(stack)-1]
		next, done, err := c.step(t)
		switch {
		case err != nil:
			return err
		case next != nil:
			stack = append(stack, next)
		case done:
			delete(c.open, t.path)
			stack = stack[:len(stack)-1]
		}
	}
	return nil
}

// try begins to look at a path.
func (c *choosing) try(p nixproto.StorePath) (*trial, error) {
	candidates, err := c.candidates(p)
	c.open[p] = true
	return &trial{path: p, candidates: candidates}, err
}

// step looks at the next reference of a trial's candidate. It returns the trial
// of a reference that has to be chosen before, or that t is done.
func (c *choosing) step(t *trial) (next *trial, done bool, err error) {
	if t.candidate == len(t.candidates) {
		c.found[t.path] = nil
		return nil, true, nil
	}
	now := t.candidates[t.candidate]
	if t.ref == len(now.rec.References) {
		c.found[t.path] = now
		return nil, true, nil
	}
	ref := now.rec.References[t.ref]
	usable := ref == t.path || c.own[ref]
	if !usable {
		chosen, known := c.found[ref]
		if !known && !c.open[ref] {
			own, err := c.r.has(c.v.account, ref)
			if err != nil {
				return nil, false, err
			}
			if !own {
				next, err := c.try(ref)
				return next, false, err
			}
			c.own[ref] = true
		}
		usable = chosen != nil || c.own[ref]
	}
	if usable {
		t.ref++
	} else {
		t.candidate, t.ref = t.candidate+1, 0
	}
	return nil, false, nil
}

// candidates returns the records that a path may be lent with, the first choice
// first; just the one that was chosen before, if there is one.
func (c *choosing) candidates(p nixproto.StorePath) (list []*choice, err error) {
	v := c.v
	v.mu.Lock()
	before := v.choices[p]
	v.mu.Unlock()
	if before != nil {
		return []*choice{before}, nil
	}
	trust := v.trust.Load()
	add := func(r *record, keys []nixproto.PublicKey, deriver bool) error {
		lent := &record{PathInfo: r.PathInfo, outputs: r.outputs}
		lent.RegistrationTime, lent.Ultimate = 0, false
		if keys != nil {
			if len(v.s.goodSignatures(r, keys)) == 0 {
				return nil
			}
			lent.Signatures = v.s.goodSignatures(r, trust.Keys)
		}
		if !deriver {
			lent.Deriver = ""
		}
		h, err := sumOf(r.NarHash)
		list = append(list, &choice{lent, h})
		return err
	}
	for _, a := range trust.Linked {
		r, err := c.r.get(a, p)
		if err == nil && r != nil {
			err = add(r, nil, true)
		}
		if err != nil {
			return nil, err
		}
	}
	for _, k := range v.public {
		accounts, err := c.r.signedBy(k.Name, p)
		if err != nil {
			return nil, err
		}
		for _, a := range accounts {
			r, err := c.r.get(a, p)
			if err == nil && r != nil {
				err = add(r, []nixproto.PublicKey{k}, false)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	for _, o := range trust.Offers {
		r, err := c.r.get(o.Account, p)
		if err == nil && r != nil {
			err = add(r, o.Keys, true)
		}
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}

// settle takes hold of what was chosen, if a lease is held. ok is false if that
// is not there any more, or something else was chosen meanwhile.
func (c *choosing) settle() (ok bool, err error) {
	v := c.v
	v.mu.Lock()
	held, own := v.leases > 0, v.own
	v.mu.Unlock()
	if !held {
		return true, nil
	}
	if len(c.own) > 0 {
		refs := make([]nixproto.StorePath, 0, len(c.own))
		for p := range c.own {
			refs = append(refs, p)
		}
		own.Add(refs...)
		if missing, err := v.s.missing(v.account, refs); missing != "" || err != nil {
			return false, err
		}
	}
	pins := make(map[sum]bool)
	defer func() {
		for h := range pins {
			v.s.pins.unpin(h)
		}
	}()
	for _, choice := range c.found {
		if pins[choice.sum] {
			continue
		}
		v.s.pins.pin(choice.sum)
		pins[choice.sum] = true
		if _, stored, err := v.s.lookupBlob(choice.sum); !stored || err != nil {
			return false, err
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leases == 0 {
		return true, nil
	}
	if v.own != own { // all were released, and another one taken
		return false, nil
	}
	if v.s.removals.Load() != c.removals {
		return false, nil
	}
	for p, choice := range c.found {
		if old := v.choices[p]; old != nil && old != choice {
			return false, nil
		}
	}
	for p, choice := range c.found {
		v.choices[p] = choice
		if !v.pinned[choice.sum] {
			v.pinned[choice.sum] = true
			delete(pins, choice.sum) // it is v's now
		}
	}
	return true, nil
}

// retain says that a lease is held.
func (v *Sight) retain() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leases++; v.leases == 1 {
		v.choices = make(map[nixproto.StorePath]*choice)
		v.pinned = make(map[sum]bool)
		v.own = v.s.NewLease(v.account)
		v.removals = v.s.removals.Load()
	}
}

// release says that a lease is held no more.
func (v *Sight) release() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leases--; v.leases > 0 {
		return
	}
	for h := range v.pinned {
		v.s.pins.unpin(h)
	}
	v.own.Release()
	v.choices, v.pinned, v.own = nil, nil, nil
}

// forgetRemovedLocked drops all choices if an account was removed: some may be
// its. Their content stays as long as it would have.
func (v *Sight) forgetRemovedLocked() {
	if now := v.s.removals.Load(); v.leases > 0 && now != v.removals {
		v.removals = now
		clear(v.choices)
	}
}

// info returns a copy of what is known of the path.
func (r *record) info() *nixproto.PathInfo {
	info := r.PathInfo // a pending record stays as it is
	info.References, info.Signatures = slices.Clip(info.References), slices.Clip(info.Signatures)
	return &info
}

// goodRealisationSignatures returns those signatures of a realisation that keys
// made.
func goodRealisationSignatures(r *nixproto.Realisation, keys []nixproto.PublicKey) (good []string) {
	fingerprint := r.Fingerprint()
	for _, sig := range r.Signatures {
		name, _, _ := strings.Cut(sig, ":")
		if slices.ContainsFunc(keys, func(k nixproto.PublicKey) bool { return k.Name == name && k.Verify(fingerprint, sig) }) {
			good = append(good, sig)
		}
	}
	return good
}
