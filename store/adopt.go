package store

import (
	"context"

	"nbd/nixproto"
)

// What a path of the own view refers to is in the own view, too. If it was only
// lent before, it becomes the account's own with its closure, in the commit of
// the path that needs it: with the content that was chosen, as something that
// was granted. Nothing else of another view enters this one.

// references looks for the references of paths that are about to be added. It
// returns the records of those that are only lent and of their closures, each
// after those that it refers to, or the first one that is not there; inBurst
// tells which paths need not be looked for. The references are leased already.
func (b *burst) references(ctx context.Context, refs []nixproto.StorePath, inBurst func(nixproto.StorePath) bool) (lent []*record, missing nixproto.StorePath, err error) {
	var others []nixproto.StorePath
	for _, p := range refs {
		if !inBurst(p) {
			others = append(others, p)
		}
	}
	if len(others) == 0 {
		return nil, "", nil
	}
	if missing, err = b.s.missing(b.req.account, others); missing == "" || err != nil || b.sight.alone {
		return nil, missing, err
	}
	for range maxChoosing {
		lent, missing, err = b.borrow(ctx, others, inBurst)
		if missing == "" || err != nil {
			return lent, missing, err
		}
	}
	return nil, missing, nil
}

// borrow returns the records of those of paths that are not in the own view,
// and of their closures, with their content pinned and with what they refer to
// in the own view leased. missing may have come to be missing just now.
func (b *burst) borrow(ctx context.Context, paths []nixproto.StorePath, inBurst func(nixproto.StorePath) bool) (lent []*record, missing nixproto.StorePath, err error) {
	chosen, err := b.sight.choose(ctx, paths)
	if err != nil {
		return nil, "", err
	}
	borrowed := make(map[nixproto.StorePath]bool)
	own := paths
	// What is chosen nowhere is in the own view or missing; which, is seen below.
	want := func(p nixproto.StorePath) (*record, error) {
		if c := chosen[p]; c != nil && !inBurst(p) {
			return c.rec, nil
		}
		return &record{PathInfo: nixproto.PathInfo{Path: p}}, nil
	}
	err = walk(ctx, paths, want, func(r *record) {
		c := chosen[r.Path]
		if c == nil || c.rec != r {
			return
		}
		borrowed[r.Path] = true
		rec := *r
		rec.RegistrationTime = b.s.cfg.Now().Unix()
		lent = append(lent, &rec)
		own = append(own[:len(own):len(own)], r.References...)
	})
	if err != nil {
		return nil, "", err
	}
	b.lease.Add(own...)
	own = deleteFunc(own, func(p nixproto.StorePath) bool { return borrowed[p] || inBurst(p) })
	if missing, err = b.s.missing(b.req.account, own); missing != "" || err != nil {
		return nil, missing, err
	}
	for _, r := range lent {
		h := chosen[r.Path].sum
		b.pin(h)
		if _, stored, err := b.s.lookupBlob(h); !stored || err != nil {
			return nil, r.Path, err
		}
	}
	return lent, "", nil
}

// deleteFunc returns the members of list that drop does not select.
func deleteFunc(list []nixproto.StorePath, drop func(nixproto.StorePath) bool) (rest []nixproto.StorePath) {
	for _, p := range list {
		if !drop(p) {
			rest = append(rest, p)
		}
	}
	return rest
}
