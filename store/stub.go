package store

import (
	"context"
	"io"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// Store is one state directory. Its methods are safe for concurrent use.
type Store struct{}

// Open opens the state directory dir, making it if needed, and recovers from
// whatever happened to the process that had it last. Errors: ErrLocked,
// ErrTooNew.
func Open(dir string, cfg Config) (*Store, error) { return nil, ErrClosed }

// Close waits for writes that are under way, writes what is pending and closes
// the store.
func (s *Store) Close() error { return nil }

// AddAccount makes an account with its signing key and first keys. Names are
// those of CheckAccountName; a name that was ever used, or a key of another
// account, is ErrExists.
func (s *Store) AddAccount(ctx context.Context, name string, keys ...Key) (Account, error) {
	return Account{}, nil
}

// RemoveAccount ends an account: its keys, its view, its uploaded logs.
func (s *Store) RemoveAccount(ctx context.Context, a AccountID) error { return nil }

// Accounts lists the accounts by name.
func (s *Store) Accounts(ctx context.Context) ([]Account, error) { return nil, nil }

// AccountByName returns the account of that name, or ErrNotFound.
func (s *Store) AccountByName(ctx context.Context, name string) (Account, error) {
	return Account{}, nil
}

// AccountByID returns the account, or ErrNotFound.
func (s *Store) AccountByID(ctx context.Context, a AccountID) (Account, error) {
	return Account{}, nil
}

// AccountByKey returns the account that an SSH public key in wire format
// opens, or ErrNotFound.
func (s *Store) AccountByKey(ctx context.Context, wire []byte) (Account, Key, error) {
	return Account{}, Key{}, nil
}

// AddKey gives the account another key. A key that any account has is ErrExists.
func (s *Store) AddKey(ctx context.Context, a AccountID, k Key) (Key, error) { return k, nil }

// RemoveKey removes the key with that fingerprint and returns whose it was.
func (s *Store) RemoveKey(ctx context.Context, fingerprint string) (AccountID, error) { return 0, nil }

// Keys lists the keys of an account, in the order they were added.
func (s *Store) Keys(ctx context.Context, a AccountID) ([]Key, error) { return nil, nil }

// SigningKey returns the secret key that signs what the account builds, in
// Nix's form "<name>:<base64>".
func (s *Store) SigningKey(ctx context.Context, a AccountID) (string, error) { return "", nil }

// Info returns what the account's view knows of a path, or ErrNotFound.
func (s *Store) Info(ctx context.Context, a AccountID, p nixproto.StorePath) (*nixproto.PathInfo, error) {
	return nil, ErrNotFound
}

// Valid returns those of paths that are in the account's view, in their order.
func (s *Store) Valid(ctx context.Context, a AccountID, paths []nixproto.StorePath) ([]nixproto.StorePath, error) {
	return nil, nil
}

// All returns every path of the view, sorted.
func (s *Store) All(ctx context.Context, a AccountID) ([]nixproto.StorePath, error) { return nil, nil }

// ByHashPart returns the path of the view with that hash part, or ErrNotFound.
func (s *Store) ByHashPart(ctx context.Context, a AccountID, part string) (nixproto.StorePath, error) {
	return "", ErrNotFound
}

// Closure returns what roots refer to, directly or not, themselves included,
// each path after those that it refers to. A root that is not in the view is
// ErrNotFound.
func (s *Store) Closure(ctx context.Context, a AccountID, roots []nixproto.StorePath) ([]nixproto.StorePath, error) {
	return nil, nil
}

// ClosureInfo is Closure with what is known of each path.
func (s *Store) ClosureInfo(ctx context.Context, a AccountID, roots []nixproto.StorePath) ([]nixproto.PathInfo, error) {
	return nil, nil
}

// Referrers returns the paths of the view that refer to p, sorted; p itself is
// among them if it refers to itself. p not in the view is ErrNotFound.
func (s *Store) Referrers(ctx context.Context, a AccountID, p nixproto.StorePath) ([]nixproto.StorePath, error) {
	return nil, nil
}

// ValidDerivers returns the derivations in the view that have p as an output,
// sorted: its deriver, and those whose .drv file names it.
func (s *Store) ValidDerivers(ctx context.Context, a AccountID, p nixproto.StorePath) ([]nixproto.StorePath, error) {
	return nil, nil
}

// AddSignatures adds signatures to a path of the view; those it has stay. They
// are not verified here. Not in the view: ErrNotFound.
func (s *Store) AddSignatures(ctx context.Context, a AccountID, p nixproto.StorePath, sigs []string) error {
	return nil
}

// AddRealisation stores r in the view; an earlier one of the same output is
// replaced. The output path must be in the view.
func (s *Store) AddRealisation(ctx context.Context, a AccountID, r *nixproto.Realisation) error {
	return nil
}

// Realisation returns the realisation of an output of the derivation with that
// hash modulo, or ErrNotFound.
func (s *Store) Realisation(ctx context.Context, a AccountID, drvHash nixproto.Hash, output string) (*nixproto.Realisation, error) {
	return nil, ErrNotFound
}

// PutLog stores the log that a client uploaded for the derivation with that
// base name, in the account's view; it replaces an earlier one.
func (s *Store) PutLog(ctx context.Context, a AccountID, drvBase string, log io.Reader) error {
	return nil
}

// Log returns the log that was uploaded for a derivation, or ErrNotFound. The
// caller closes it.
func (s *Store) Log(ctx context.Context, a AccountID, drvBase string) (io.ReadCloser, error) {
	return nil, ErrNotFound
}

// NewUpload begins a burst of uploads into the account's view.
func (s *Store) NewUpload(ctx context.Context, a AccountID, opts UploadOptions) (*Upload, error) {
	return nil, nil
}

// An Upload brings paths into a view: Add for each, then Commit, which makes
// all of them durable and visible at once, and ends the upload. It is used by
// one goroutine; several uploads may go on at once.
type Upload struct{}

// Add reads one NAR of exactly info.NarSize bytes from r, not a byte more, and
// adds the path to the upload. Everything info claims of the content is
// verified (ErrInvalid). A path that the view has already keeps the content
// that it has, whatever arrives, as in Nix; its bytes are read and verified
// all the same. After ErrInvalid the upload goes on without the path.
//
// If r has a method NextChunk(max int) ([]byte, error), returning 1 to max
// bytes that stay unchanged until its next call, it is used instead of Read.
func (u *Upload) Add(info *nixproto.PathInfo, r io.Reader) error { return nil }

// Kept lists the paths whose content was another than the one in the view, and
// was dropped.
func (u *Upload) Kept() []nixproto.StorePath { return nil }

// Commit makes what was added durable and visible. After an error nothing of
// it is.
func (u *Upload) Commit() error { return nil }

// Abort drops what was added. It does nothing after Commit.
func (u *Upload) Abort() {}

// Stage begins to take one NAR whose path, hash and size are not known yet.
func (s *Store) Stage(ctx context.Context) (*Staged, error) { return nil, nil }

// A Staged is a NAR that is stored but in no view yet. It is written by one
// goroutine: Write until Finish, then it can be read by several.
type Staged struct{}

// Write takes bytes of the NAR. Malformed bytes, and any after the NAR's end,
// are ErrInvalid.
func (st *Staged) Write(p []byte) (int, error) { return 0, nil }

// Finish says that the NAR is complete.
func (st *Staged) Finish() error { return nil }

// NarHash returns the SHA-256 of the NAR; after Finish.
func (st *Staged) NarHash() nixproto.Hash { return nixproto.Hash{} }

// NarSize returns the length of the NAR; after Finish.
func (st *Staged) NarSize() uint64 { return 0 }

// Index returns what is in the NAR; after Finish. The caller does not change it.
func (st *Staged) Index() nar.Index { return nil }

// ReadAt reads bytes of the NAR; after Finish and before Discard or Register.
func (st *Staged) ReadAt(p []byte, off int64) (int, error) { return 0, nil }

// Discard drops the NAR; nothing happens if it was registered.
func (st *Staged) Discard() {}

// Register makes the paths valid in the account's view, all at once and
// durable. References must be valid in the view or be registered along. A path
// that the view has already keeps its content. The Staged are used up by
// success and remain the caller's after an error.
func (s *Store) Register(ctx context.Context, a AccountID, regs []Registration) error { return nil }

// OpenBlob opens the NAR with that hash, or returns ErrNotFound. Below views,
// content is named by hash: the caller has seen to it that the account may
// have it.
func (s *Store) OpenBlob(ctx context.Context, narHash nixproto.Hash) (*Blob, error) {
	return nil, ErrNotFound
}

// HasBlob reports whether the NAR with that hash is stored.
func (s *Store) HasBlob(ctx context.Context, narHash nixproto.Hash) (bool, error) { return false, nil }

// A Blob is a stored NAR, open for reading by several goroutines. It stays
// readable until Close, whatever is deleted or collected.
type Blob struct{}

// ReadAt implements io.ReaderAt over the NAR.
func (b *Blob) ReadAt(p []byte, off int64) (int, error) { return 0, io.EOF }

// Size returns the length of the NAR in bytes.
func (b *Blob) Size() int64 { return 0 }

// Index returns what is in the NAR. It is shared: the caller does not change it.
func (b *Blob) Index() (nar.Index, error) { return nil, nil }

// Close gives up the blob.
func (b *Blob) Close() error { return nil }

// NewLease returns an empty lease on paths of the account's view.
func (s *Store) NewLease(a AccountID) *Lease { return &Lease{} }

// A Lease keeps paths, with their closures, from deletion and collection until
// Release. Its methods are safe for concurrent use.
type Lease struct{}

// Add puts paths under the lease. They need not be valid: to be sure of a path,
// lease it first and ask whether it is valid then.
func (l *Lease) Add(paths ...nixproto.StorePath) {}

// Release ends the lease.
func (l *Lease) Release() {}

// Delete removes paths from the view. If others than those refer to one of
// them, or it is leased, nothing is removed and the error is ErrInUse and
// names it. Paths that are not in the view are ErrNotFound. Bytes that
// nobody has any more go at the next Sweep.
func (s *Store) Delete(ctx context.Context, a AccountID, paths ...nixproto.StorePath) (GCResult, error) {
	return GCResult{}, nil
}

// GC deletes from the view what is neither leased nor kept by the options,
// referrers first.
func (s *Store) GC(ctx context.Context, a AccountID, opts GCOptions) (GCResult, error) {
	return GCResult{}, nil
}

// Sweep removes blobs that no view has, and returns the bytes freed on disk.
func (s *Store) Sweep(ctx context.Context) (freed uint64, err error) { return 0, nil }

// NewBuild stores a new record of a build; its ID is given by the store.
func (s *Store) NewBuild(ctx context.Context, b *Build) error { return nil }

// PutBuild stores a build record over the one with its ID.
func (s *Store) PutBuild(ctx context.Context, b *Build) error { return nil }

// Build returns the record of a build, or ErrNotFound.
func (s *Store) Build(ctx context.Context, id BuildID) (*Build, error) { return nil, ErrNotFound }

// Builds returns the builds of an account that f selects, newest first.
func (s *Store) Builds(ctx context.Context, a AccountID, f BuildFilter) ([]Build, error) {
	return nil, nil
}

// CreateBuildLog begins the log of a build. There is one log for a build.
func (s *Store) CreateBuildLog(ctx context.Context, id BuildID) (*BuildLog, error) { return nil, nil }

// A BuildLog is a log that is being written. It is written by one goroutine.
type BuildLog struct{}

// Write appends to the log. Readers see it at once.
func (l *BuildLog) Write(p []byte) (int, error) { return len(p), nil }

// Close ends and compresses the log; readers that follow it come to its end.
func (l *BuildLog) Close() error { return nil }

// OpenBuildLog reads the log of a build from its beginning, byte for byte as
// it was written. While the log is being written, Read waits for more until
// it is closed or ctx ends; a log that has ended is io.EOF. ErrNotFound if the
// build has no log. The caller closes it.
func (s *Store) OpenBuildLog(ctx context.Context, id BuildID) (io.ReadCloser, error) {
	return nil, ErrNotFound
}

// Result returns what is stored under a reuse key; ok is false if nothing is.
func (s *Store) Result(ctx context.Context, key [32]byte) (r *Result, ok bool, err error) {
	return nil, false, nil
}

// PutResult stores r under key unless there is a result already, and reports
// whether it did.
func (s *Store) PutResult(ctx context.Context, key [32]byte, r *Result) (stored bool, err error) {
	return false, nil
}

// Check compares the index with the blobs; with readData it reads and hashes
// every byte. It may run while the store is used.
func (s *Store) Check(ctx context.Context, readData bool) (*Report, error) { return nil, nil }

// Stats are the numbers of `nbd admin status`.
type Stats struct {
	Accounts int
	Paths    int    // in all views
	Blobs    int    // each counted once
	Bytes    uint64 // of the blobs
	Builds   int
}

// Stats counts what is in the store.
func (s *Store) Stats(ctx context.Context) (Stats, error) { return Stats{}, nil }
