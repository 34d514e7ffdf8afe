package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"

	bolt "go.etcd.io/bbolt"

	"nbd/nixproto"
)

// The bucket "signed" tells whose views have a path with a signature in the
// name of a public key: key name, 0, base name of the path, 0, account id →
// nothing. It says nothing of whether the signature is any good: who may use
// the path verifies it then, over the record that is there then. Entries of
// removed accounts may stay a while; their views are gone.

// A signedIndex writes the entries of records of one account.
type signedIndex struct {
	bucket  *bolt.Bucket
	names   map[string]bool // of public keys
	account AccountID
}

// indexIn returns the index of an account's records, to give to a view that is
// written.
func (s *Store) indexIn(tx *bolt.Tx, a AccountID) *signedIndex {
	return &signedIndex{tx.Bucket(bucketSigned), s.publicNames, a}
}

// writeView is openView for a view that is going to be changed.
func (s *Store) writeView(tx *bolt.Tx, a AccountID) (*view, error) {
	v, err := openView(tx, a)
	if err == nil {
		v.signed = s.indexIn(tx, a)
	}
	return v, err
}

func (x *signedIndex) put(r *record) error {
	for _, name := range signers(r, x.names) {
		if err := x.bucket.Put(signedKey(name, r.Path.Base(), x.account), nil); err != nil {
			return err
		}
	}
	return nil
}

func (x *signedIndex) remove(r *record) error {
	for _, name := range signers(r, x.names) {
		if err := x.bucket.Delete(signedKey(name, r.Path.Base(), x.account)); err != nil {
			return err
		}
	}
	return nil
}

// signers returns those of names in which r has signatures, each once.
func signers(r *record, names map[string]bool) (list []string) {
	for _, sig := range r.Signatures {
		name, _, _ := strings.Cut(sig, ":")
		if names[name] && !slices.Contains(list, name) {
			list = append(list, name)
		}
	}
	return list
}

// signedPrefix returns how the keys of the entries of a path begin.
func signedPrefix(name, base string) []byte { return append(pairKey(name, base), 0) }

func signedKey(name, base string, a AccountID) []byte {
	return binary.BigEndian.AppendUint64(signedPrefix(name, base), uint64(a))
}

// signedBy returns the accounts whose views may have a path with a signature in
// that name, in order.
func (r *reader) signedBy(name string, p nixproto.StorePath) (accounts []AccountID, err error) {
	pending := r.s.pendingSigned(p)
	if r.s.flushes.Load() != r.flushes { // what was pending is in the database
		if err := r.renew(); err != nil {
			return nil, err
		}
	}
	accounts = pending
	prefix := signedPrefix(name, p.Base())
	c := r.tx.Bucket(bucketSigned).Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		accounts = append(accounts, AccountID(keyID(k[len(prefix):])))
	}
	slices.Sort(accounts)
	return slices.Compact(accounts), nil
}

// signedWithHash returns the paths with that hash part that some view has with a
// signature in that name, as the database has them.
func signedWithHash(tx *bolt.Tx, name, part string) (paths []nixproto.StorePath) {
	prefix := pairKey(name, part+"-")
	c := tx.Bucket(bucketSigned).Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		base, _, _ := bytes.Cut(k[len(name)+1:], []byte{0})
		if p := nixproto.StorePath(storePrefix + string(base)); !slices.Contains(paths, p) {
			paths = append(paths, p)
		}
	}
	return paths
}

// indexSigned makes the index anew if the names of the public keys are others
// than those it was made for.
func (s *Store) indexSigned() error {
	names := slices.Sorted(func(yield func(string) bool) {
		for name := range s.publicNames {
			if !yield(name) {
				return
			}
		}
	})
	made := []byte(strings.Join(names, "\n"))
	return s.updateLocked(func(tx *bolt.Tx) error {
		meta := tx.Bucket(bucketMeta)
		if old := meta.Get(metaSigned); old != nil && bytes.Equal(old, made) {
			return nil
		}
		if err := tx.DeleteBucket(bucketSigned); err != nil {
			return err
		}
		if _, err := tx.CreateBucket(bucketSigned); err != nil {
			return err
		}
		err := tx.Bucket(bucketViews).ForEachBucket(func(k []byte) error {
			v, err := s.writeView(tx, AccountID(keyID(k)))
			if err != nil {
				return err
			}
			return v.each(func(p nixproto.StorePath, rec []byte) error {
				r, err := decodeRecord(p, rec)
				if err != nil {
					return err
				}
				return v.signed.put(r)
			})
		})
		if err != nil {
			return err
		}
		return meta.Put(metaSigned, made)
	})
}

// signedBatch is how many entries of a removed account go in one transaction.
const signedBatch = 2000

// dropSigned removes the entries of an account whose view is gone.
func (s *Store) dropSigned(ctx context.Context, a AccountID) error {
	suffix := idKey(uint64(a))
	for from := []byte(nil); ; {
		var gone [][]byte
		err := s.db.View(func(tx *bolt.Tx) error {
			c := tx.Bucket(bucketSigned).Cursor()
			k, _ := c.Seek(from)
			for n := 0; k != nil && len(gone) < signedBatch; k, _ = c.Next() {
				if bytes.HasSuffix(k, suffix) {
					gone = append(gone, slices.Clone(k))
				}
				if n++; n%signedBatch == 0 && ctx.Err() != nil {
					return ctx.Err()
				}
			}
			return nil
		})
		if err != nil || len(gone) == 0 {
			return databaseError(err)
		}
		err = s.update(func(tx *bolt.Tx) error {
			for _, k := range gone {
				if err := tx.Bucket(bucketSigned).Delete(k); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		from = gone[len(gone)-1]
	}
}

// maxVerified is how many signatures are remembered to be good.
const maxVerified = 200_000

// verified remembers signatures that are good: a closure of thousands of lent
// paths would otherwise cost as many of them for each session.
type verified struct {
	mu   sync.Mutex
	good map[[sha256.Size]byte]struct{}
}

// check reports whether one of keys made the signature of the fingerprint.
func (c *verified) check(fingerprint, sig string, keys []nixproto.PublicKey) bool {
	name, _, _ := strings.Cut(sig, ":")
	for _, k := range keys {
		if k.Name == name && c.checkOne(fingerprint, sig, k) {
			return true
		}
	}
	return false
}

func (c *verified) checkOne(fingerprint, sig string, k nixproto.PublicKey) bool {
	// Neither of the last two has a line feed in it.
	id := sha256.Sum256([]byte(k.String() + "\n" + sig + "\n" + fingerprint))
	c.mu.Lock()
	_, known := c.good[id]
	c.mu.Unlock()
	if known {
		return true
	}
	if !k.Verify(fingerprint, sig) {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.good == nil || len(c.good) >= maxVerified {
		c.good = make(map[[sha256.Size]byte]struct{})
	}
	c.good[id] = struct{}{}
	return true
}

// goodSignatures returns those signatures of a record that keys made.
func (s *Store) goodSignatures(r *record, keys []nixproto.PublicKey) (good []string) {
	if len(r.Signatures) == 0 || len(keys) == 0 {
		return nil
	}
	fingerprint := ""
	for _, sig := range r.Signatures {
		name, _, _ := strings.Cut(sig, ":")
		if !slices.ContainsFunc(keys, func(k nixproto.PublicKey) bool { return k.Name == name }) {
			continue
		}
		if fingerprint == "" {
			fingerprint = r.Fingerprint()
		}
		if s.verified.check(fingerprint, sig, keys) {
			good = append(good, sig)
		}
	}
	return good
}

// publicKeys returns those of keys that are the operator's public keys.
func (s *Store) publicKeys(keys []nixproto.PublicKey) (public []nixproto.PublicKey) {
	for _, k := range keys {
		if slices.Contains(s.cfg.PublicKeys, k) && !slices.Contains(public, k) {
			public = append(public, k)
		}
	}
	return public
}

// setPublicNames takes over Config.PublicKeys.
func (s *Store) setPublicNames() {
	s.publicNames = make(map[string]bool)
	for _, k := range s.cfg.PublicKeys {
		s.publicNames[k.Name] = true
	}
}

// openIndex brings the index up to date when the store is opened. If the disk
// is full the store is opened all the same; nothing can be used for a public
// key's sake then.
func (s *Store) openIndex() {
	if err := s.indexSigned(); err != nil {
		s.log.Error("index content by public keys", "error", fmt.Errorf("nobody can use it: %w", err))
		s.cfg.PublicKeys = nil
		s.setPublicNames()
	}
}
