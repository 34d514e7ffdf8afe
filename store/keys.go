package store

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// A Key is an SSH public key that opens an account.
type Key struct {
	// Wire is the key in SSH wire format (RFC 4253, 6.6; ssh.PublicKey.Marshal).
	Wire []byte
	// Type is the name of the key's algorithm, and Fingerprint "SHA256:" and
	// unpadded base64, as OpenSSH prints it. The store computes both.
	Type, Fingerprint string
	// Comment is what followed the key in its file.
	Comment string
	// Permissions are those of Permissions that the key has; nil means all
	// when a key is added, an empty slice means none.
	Permissions []string
	// Added is set by the store.
	Added time.Time
}

// maxKey is the length of the longest key, in bytes; an RSA key of 16384 bits
// takes 2 KiB.
const maxKey = 16 << 10

// keyType returns the name of a key's algorithm, the first field of its wire
// format; "" if it is malformed.
func keyType(wire []byte) string {
	if len(wire) < 4 {
		return ""
	}
	n := binary.BigEndian.Uint32(wire)
	if uint64(n) > uint64(len(wire)-4) {
		return ""
	}
	return string(wire[4 : 4+n])
}

const fingerprintPrefix = "SHA256:"

// fingerprint returns the fingerprint of a key with that SHA-256.
func fingerprint(h [32]byte) string {
	return fingerprintPrefix + base64.RawStdEncoding.EncodeToString(h[:])
}

// Permissions returns all permissions that a key can have.
func Permissions() []string {
	return []string{"build:read", "build:write", "store:read", "store:write", "account:read", "account:write"}
}

// A keyRecord is the value of a key in the database.
type keyRecord struct {
	Account     AccountID `json:"account"`
	Wire        []byte    `json:"wire"`
	Comment     string    `json:"comment,omitempty"`
	Permissions []string  `json:"permissions"`
	Added       time.Time `json:"added"`
}

func (r *keyRecord) key() Key {
	return Key{Wire: r.Wire, Type: keyType(r.Wire), Fingerprint: fingerprint(sha256.Sum256(r.Wire)), Comment: r.Comment, Permissions: r.Permissions, Added: r.Added}
}

// AccountByKey returns the account that an SSH public key in wire format
// opens, or ErrNotFound.
func (s *Store) AccountByKey(ctx context.Context, wire []byte) (a Account, k Key, err error) {
	h := sha256.Sum256(wire)
	err = s.db.View(func(tx *bolt.Tx) error {
		var rec keyRecord
		ok, err := getJSON(tx.Bucket(bucketKeys), h[:], &rec)
		if err == nil && !ok {
			err = ErrNotFound
		}
		if err != nil {
			return fmt.Errorf("key %s: %w", fingerprint(h), err)
		}
		acc, err := getAccount(tx, rec.Account)
		if err != nil {
			return err
		}
		a, k = acc.account(rec.Account), rec.key()
		return nil
	})
	return a, k, databaseError(err)
}

// AddKey gives the account another key, and returns it as stored. A key that
// any account has is ErrExists; a malformed one or an unknown permission is
// ErrInvalid.
func (s *Store) AddKey(ctx context.Context, a AccountID, k Key) (Key, error) {
	err := s.update(func(tx *bolt.Tx) (err error) {
		if _, err := getAccount(tx, a); err != nil {
			return err
		}
		k, err = s.putKey(tx, a, k)
		return err
	})
	if err != nil {
		return Key{}, fmt.Errorf("add key: %w", err)
	}
	return k, nil
}

// putKey stores a new key.
func (s *Store) putKey(tx *bolt.Tx, a AccountID, k Key) (Key, error) {
	if len(k.Wire) > maxKey || keyType(k.Wire) == "" {
		return k, fmt.Errorf("%w key: it is not an SSH public key", ErrInvalid)
	}
	if k.Permissions == nil {
		k.Permissions = Permissions()
	}
	for _, p := range k.Permissions {
		if !slices.Contains(Permissions(), p) {
			return k, fmt.Errorf("%w permission %q: there are %q", ErrInvalid, p, Permissions())
		}
	}
	h := sha256.Sum256(k.Wire)
	keys := tx.Bucket(bucketKeys)
	if keys.Get(h[:]) != nil {
		return k, fmt.Errorf("key %s %w, and a key belongs to one account", fingerprint(h), ErrExists)
	}
	rec := &keyRecord{a, k.Wire, k.Comment, k.Permissions, s.cfg.Now()}
	return rec.key(), putJSON(keys, h[:], rec)
}

// RemoveKey removes the key with that fingerprint, with its settings, and returns whose it was;
// ErrNotFound if nobody has it.
func (s *Store) RemoveKey(ctx context.Context, print string) (a AccountID, err error) {
	err = s.updateSettings(func(tx *bolt.Tx, next *Settings) error {
		keys := tx.Bucket(bucketKeys)
		h, ok := parseFingerprint(print)
		var rec keyRecord
		if ok {
			if ok, err = getJSON(keys, h, &rec); err != nil {
				return err
			}
		}
		if !ok {
			return fmt.Errorf("key %q: %w", print, ErrNotFound)
		}
		a = rec.Account
		o := SettingsOwner{a, print}
		next.put(o, nil)
		return errors.Join(putSettings(tx, o, nil), keys.Delete(h))
	})
	if err != nil {
		return 0, fmt.Errorf("remove key: %w", err)
	}
	return a, nil
}

// parseFingerprint is the reverse of fingerprint.
func parseFingerprint(print string) (h []byte, ok bool) {
	if len(print) < len(fingerprintPrefix) || print[:len(fingerprintPrefix)] != fingerprintPrefix {
		return nil, false
	}
	h, err := base64.RawStdEncoding.DecodeString(print[len(fingerprintPrefix):])
	return h, err == nil && len(h) == sha256.Size
}

// Keys lists the keys of an account, in the order they were added.
func (s *Store) Keys(ctx context.Context, a AccountID) (list []Key, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		return eachKey(tx, a, func(_ []byte, rec *keyRecord) { list = append(list, rec.key()) })
	})
	slices.SortStableFunc(list, func(a, b Key) int { return a.Added.Compare(b.Added) })
	return list, databaseError(err)
}

// eachKey calls f with the keys of an account.
func eachKey(tx *bolt.Tx, a AccountID, f func(h []byte, rec *keyRecord)) error {
	return tx.Bucket(bucketKeys).ForEach(func(h, v []byte) error {
		var rec keyRecord
		if err := decodeJSON(v, &rec); err != nil {
			return err
		}
		if rec.Account == a {
			f(h, &rec)
		}
		return nil
	})
}

// removeKeys removes all keys of an account.
func removeKeys(tx *bolt.Tx, a AccountID) error {
	var all [][]byte
	if err := eachKey(tx, a, func(h []byte, _ *keyRecord) { all = append(all, slices.Clone(h)) }); err != nil {
		return err
	}
	for _, h := range all {
		if err := tx.Bucket(bucketKeys).Delete(h); err != nil {
			return err
		}
	}
	return nil
}
