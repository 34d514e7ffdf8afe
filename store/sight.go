package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// Trust says what of other accounts' content an account may use. The caller
// has seen to it that both sides agree.
type Trust struct {
	// Linked are the accounts that trust this one and that it trusts.
	Linked []AccountID
	// Keys are the public keys whose signatures count for the account. Content
	// signed by one of them that is also in Config.PublicKeys may be used
	// whoever has it.
	Keys []nixproto.PublicKey
	// Offers are the accounts that let others use what they have signed.
	Offers []Offer
}

// An Offer is what one account lets another use of its own view: what is
// signed by one of Keys. A key that is not among the Trust's Keys as well
// opens nothing.
type Offer struct {
	Account AccountID
	Keys    []nixproto.PublicKey
}

// A Sight is what an account may use for a store path: what its own view has;
// else what the view of a linked account has; else what some view has that is
// signed by a key the account trusts, if that is a public key or the view's
// account offers it. A path of another view may be used only with its whole
// closure, each path of which is chosen in this order. What may not be used is
// not there: the answer, and the work it takes, is the same.
//
// What another view's content is chosen for a path stays chosen while a Lease
// of the Sight is held, whatever happens in that view, unless its account is
// removed; the content is kept as well. The own view goes before it at any
// time. Trust that ends meanwhile is taken away with Restrict.
//
// A Sight is for one session or build. Its methods are safe for concurrent
// use. It needs no closing.
type Sight struct {
	s       *Store
	account AccountID
	trust   atomic.Pointer[Trust] // what it points to does not change
	public  []nixproto.PublicKey  // of trust.Keys, those of the operator
	alone   bool                  // nothing can be lent, and never could

	mu       sync.Mutex
	leases   int // that are held
	removals uint64
	choices  map[nixproto.StorePath]*choice // only while leases are held
	pinned   map[sum]bool                   // likewise
	own      *Lease                         // likewise, on what choices refer to in the own view
}

// NewSight returns what the account may use with that trust.
func (s *Store) NewSight(a AccountID, t Trust) *Sight {
	v := &Sight{s: s, account: a, public: s.publicKeys(t.Keys)}
	trust := &Trust{Keys: slices.Clone(t.Keys)}
	for _, l := range t.Linked {
		if l != a && !slices.Contains(trust.Linked, l) {
			trust.Linked = append(trust.Linked, l)
		}
	}
	for _, o := range t.Offers {
		keys := slices.DeleteFunc(slices.Clone(o.Keys), func(k nixproto.PublicKey) bool { return !slices.Contains(t.Keys, k) })
		if o.Account != a && len(keys) > 0 {
			trust.Offers = append(trust.Offers, Offer{o.Account, keys})
		}
	}
	v.trust.Store(trust)
	v.alone = len(trust.Linked)+len(trust.Offers)+len(v.public) == 0
	return v
}

// Restrict takes away what is not in t of links and offers. What was chosen of
// them stays chosen; nothing more is.
func (v *Sight) Restrict(t Trust) {
	old := v.trust.Load()
	now := &Trust{Keys: old.Keys}
	for _, a := range old.Linked {
		if slices.Contains(t.Linked, a) {
			now.Linked = append(now.Linked, a)
		}
	}
	for _, o := range old.Offers {
		i := slices.IndexFunc(t.Offers, func(n Offer) bool { return n.Account == o.Account })
		if i < 0 {
			continue
		}
		keys := slices.DeleteFunc(slices.Clone(o.Keys), func(k nixproto.PublicKey) bool { return !slices.Contains(t.Offers[i].Keys, k) })
		if len(keys) > 0 {
			now.Offers = append(now.Offers, Offer{o.Account, keys})
		}
	}
	v.trust.Store(now)
}

// Account returns whose Sight it is.
func (v *Sight) Account() AccountID { return v.account }

// Own reports whether a path is in the account's own view.
func (v *Sight) Own(ctx context.Context, p nixproto.StorePath) (bool, error) {
	r, err := v.s.lookupRecord(v.account, p)
	return r != nil, err
}

// Info returns what is known of a path, or ErrNotFound. Of lent content that
// is the content, its deriver unless it came by a public key, and those
// signatures that the account may rely on; its registration time is zero. The
// result is the caller's, but for the elements of its lists.
func (v *Sight) Info(ctx context.Context, p nixproto.StorePath) (*nixproto.PathInfo, error) {
	r, err := v.s.lookupRecord(v.account, p)
	if err == nil && r == nil {
		r, err = v.lentOne(ctx, p)
	}
	if err == nil && r == nil {
		err = fmt.Errorf("path %s: %w", p, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return r.info(), nil
}

// Valid returns those of paths that may be used, in their order.
func (v *Sight) Valid(ctx context.Context, paths []nixproto.StorePath) ([]nixproto.StorePath, error) {
	own, err := v.s.Valid(ctx, v.account, paths)
	if err != nil || len(own) == len(paths) || v.alone {
		return own, err
	}
	have := make(map[nixproto.StorePath]bool, len(paths))
	for _, p := range own {
		have[p] = true
	}
	var rest []nixproto.StorePath
	for _, p := range paths {
		if !have[p] {
			rest = append(rest, p)
		}
	}
	lent, err := v.lent(ctx, rest)
	if err != nil || len(lent) == 0 {
		return own, err
	}
	valid := make([]nixproto.StorePath, 0, len(paths))
	for _, p := range paths {
		if have[p] || lent[p] != nil {
			valid = append(valid, p)
		}
	}
	return valid, nil
}

// Closure returns what roots refer to, directly or not, themselves included,
// each path after those that it refers to. A root that may not be used is
// ErrNotFound.
func (v *Sight) Closure(ctx context.Context, roots []nixproto.StorePath) ([]nixproto.StorePath, error) {
	var paths []nixproto.StorePath
	err := v.closure(ctx, roots, func(r *record) { paths = append(paths, r.Path) })
	return paths, err
}

// ClosureInfo is Closure with what is known of each path.
func (v *Sight) ClosureInfo(ctx context.Context, roots []nixproto.StorePath) ([]nixproto.PathInfo, error) {
	var infos []nixproto.PathInfo
	err := v.closure(ctx, roots, func(r *record) { infos = append(infos, *r.info()) })
	return infos, err
}

// closure calls f with the records of the closure of roots, each after those
// of the paths it refers to.
func (v *Sight) closure(ctx context.Context, roots []nixproto.StorePath, f func(*record)) error {
	chosen, err := v.choose(ctx, roots)
	if err != nil {
		return err
	}
	r, err := v.s.newReader()
	if err != nil {
		return err
	}
	defer r.close()
	return walk(ctx, roots, func(p nixproto.StorePath) (*record, error) {
		rec, err := r.get(v.account, p)
		if err == nil && rec == nil {
			if c := chosen[p]; c != nil {
				return c.rec, nil
			}
			err = fmt.Errorf("path %s: %w", p, ErrNotFound)
		}
		return rec, err
	}, f)
}

// ByHashPart returns the path with that hash part, or ErrNotFound.
func (v *Sight) ByHashPart(ctx context.Context, part string) (nixproto.StorePath, error) {
	p, err := v.s.ByHashPart(ctx, v.account, part)
	if v.alone || !errors.Is(err, ErrNotFound) || len(part) != nixproto.HashPartLen {
		return p, err
	}
	candidates, readErr := v.withHashPart(part)
	if readErr != nil {
		return "", readErr
	}
	lent, lentErr := v.lent(ctx, candidates)
	if lentErr != nil {
		return "", lentErr
	}
	for _, p := range candidates {
		if lent[p] != nil {
			return p, nil
		}
	}
	return "", err
}

// withHashPart returns the paths of others with that hash part, which the
// account may use or not.
func (v *Sight) withHashPart(part string) (paths []nixproto.StorePath, err error) {
	v.mu.Lock()
	for p := range v.choices {
		if p.HashPart() == part {
			paths = append(paths, p)
		}
	}
	v.mu.Unlock()
	err = v.s.read(func(tx *bolt.Tx) error {
		for _, a := range v.lenders() {
			if view, err := openView(tx, a); err == nil {
				if p := view.byHashPart(part); p != "" {
					paths = append(paths, p)
				}
			}
		}
		for _, k := range v.public {
			paths = append(paths, signedWithHash(tx, k.Name, part)...)
		}
		return nil
	})
	return paths, err
}

// lenders returns the linked accounts, and then those that offer something.
func (v *Sight) lenders() []AccountID {
	trust := v.trust.Load()
	all := slices.Clone(trust.Linked)
	for _, o := range trust.Offers {
		all = append(all, o.Account)
	}
	return all
}

// Referrers returns the paths that refer to p, sorted, of the own view and of
// linked accounts; p itself is among them if it refers to itself. A p that may
// not be used is ErrNotFound. It takes time in proportion to those views.
func (v *Sight) Referrers(ctx context.Context, p nixproto.StorePath) ([]nixproto.StorePath, error) {
	if _, err := v.Info(ctx, p); err != nil {
		return nil, err
	}
	var candidates []nixproto.StorePath
	targets := map[string]bool{p.Base(): true}
	err := v.s.read(func(tx *bolt.Tx) error {
		for _, a := range append([]AccountID{v.account}, v.trust.Load().Linked...) {
			view, err := openView(tx, a)
			if err != nil { // removed
				continue
			}
			err = view.referrers(targets, func(r, _ nixproto.StorePath) error {
				candidates = append(candidates, r)
				return ctx.Err()
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(candidates)
	var list []nixproto.StorePath
	for _, r := range slices.Compact(candidates) {
		info, err := v.Info(ctx, r)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if slices.Contains(info.References, p) { // not the content of another view
			list = append(list, r)
		}
	}
	return list, nil
}

// Realisation returns the realisation of an output of the derivation with that
// hash modulo, or ErrNotFound. One of another account counts if the output
// path may be used, with the content that this account has for it, and, unless
// the two are linked, the realisation is signed by a key that it offers.
func (v *Sight) Realisation(ctx context.Context, drvHash nixproto.Hash, output string) (*nixproto.Realisation, error) {
	r, err := v.s.Realisation(ctx, v.account, drvHash, output)
	if v.alone || !errors.Is(err, ErrNotFound) {
		return r, err
	}
	lent, readErr := v.lentRealisations(drvHash, output)
	if readErr != nil {
		return nil, readErr
	}
	for _, l := range lent {
		info, err := v.Info(ctx, l.OutPath)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if info.NarHash == l.content {
			return &l.Realisation, nil
		}
	}
	return nil, err
}

// A lentRealisation is another account's, with the NAR hash of its output
// there.
type lentRealisation struct {
	nixproto.Realisation
	content nixproto.Hash
}

// lentRealisations returns the realisations of an output that others have and
// that the account may rely on.
func (v *Sight) lentRealisations(drvHash nixproto.Hash, output string) (list []lentRealisation, err error) {
	err = v.s.read(func(tx *bolt.Tx) error {
		look := func(a AccountID, keys []nixproto.PublicKey) error {
			view, err := openView(tx, a)
			if err != nil { // removed
				return nil
			}
			real, out, err := view.realisation(drvHash, output)
			if out == nil || err != nil {
				return err
			}
			if keys != nil {
				if real.Signatures = goodRealisationSignatures(real, keys); len(real.Signatures) == 0 {
					return nil
				}
			}
			list = append(list, lentRealisation{*real, out.NarHash})
			return nil
		}
		trust := v.trust.Load()
		for _, a := range trust.Linked {
			if err := look(a, nil); err != nil {
				return err
			}
		}
		for _, o := range trust.Offers {
			if err := look(o.Account, o.Keys); err != nil {
				return err
			}
		}
		return nil
	})
	return list, err
}

// NewLease returns an empty lease on paths of the account's view. While it is
// held the Sight keeps to its choices, and their content is kept. Paths of
// other views stay deletable there.
func (v *Sight) NewLease() *Lease {
	l := v.s.NewLease(v.account)
	l.sight = v
	v.retain()
	return l
}

// NewUpload begins a burst of uploads into the account's own view, as
// Store.NewUpload does. What it refers to may be lent: it then enters the own
// view with its closure, in the same commit.
func (v *Sight) NewUpload(ctx context.Context, opts UploadOptions) (*Upload, error) {
	return v.s.newUpload(ctx, v, opts)
}

// Register is Store.Register into the own view. What the paths refer to may be
// lent, as with NewUpload.
func (v *Sight) Register(ctx context.Context, regs []Registration) error {
	return v.s.register(ctx, v, regs)
}
