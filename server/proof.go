package server

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hiddeco/sshsig"
	gossh "golang.org/x/crypto/ssh"

	"nbd/store"
)

// Who adds an SSH key to his account proves that he has it: he signs, with the
// key, a challenge that names key, account and server, by `ssh-keygen -Y sign`
// (OpenSSH's PROTOCOL.sshsig). The server remembers nothing of a challenge: it
// is authenticated by a secret that lives as long as the process, and holds for
// its period and the one after it.

// proofNamespace is what -n of ssh-keygen has to say: signatures for other uses
// of a key prove nothing here.
const proofNamespace = "nbd"

// proofPeriod is how long a challenge holds at least.
const proofPeriod = 15 * time.Minute

// A proofSecret makes challenges. Its zero value is ready.
type proofSecret struct {
	once sync.Once
	key  [32]byte
}

// mac authenticates a challenge.
func (s *proofSecret) mac(text string) string {
	s.once.Do(func() { _, _ = rand.Read(s.key[:]) }) // it does not fail: it ends the program instead
	h := hmac.New(sha256.New, s.key[:])
	h.Write([]byte(text))
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:18])
}

// A proof is that of one key for one account, now.
type proof struct {
	secret  *proofSecret
	server  string // fingerprint of the server's host key
	account store.Account
	key     gossh.PublicKey
	now     time.Time
}

func (c *apiCall) newProof(key gossh.PublicKey) *proof {
	return &proof{&c.server.proofs, gossh.FingerprintSHA256(c.server.cfg.HostKey.PublicKey()), c.Client.Account, key, time.Now()}
}

// challenge is what is to be signed.
func (p *proof) challenge() string { return p.challengeAt(p.now) }

func (p *proof) challengeAt(t time.Time) string {
	text := fmt.Sprintf("nbd: add SSH key %s to account %s (%d) of server %s", gossh.FingerprintSHA256(p.key), p.account.Name, p.account.ID, p.server)
	return text + ": " + p.secret.mac(fmt.Sprintf("%d %s", t.UnixNano()/int64(proofPeriod), text))
}

// maxSignature bounds a signature as text.
const maxSignature = 16 << 10

// verify checks a signature: as ssh-keygen prints it, or without its first and
// last line. Its error is for the client.
func (p *proof) verify(text string) error {
	if len(text) > maxSignature {
		return refusef("the signature is longer than %d bytes", maxSignature)
	}
	sig, err := parseSignature(text)
	if err != nil {
		return refusef("this is no signature as `ssh-keygen -Y sign` prints it")
	}
	for _, t := range []time.Time{p.now, p.now.Add(-proofPeriod)} {
		if err = sshsig.Verify(strings.NewReader(p.challengeAt(t)), sig, p.key, sig.HashAlgorithm, proofNamespace); err == nil {
			return nil
		}
	}
	return refusef("the signature does not prove that you have the key %s; `ssh-keys add` without --signature says what to sign (a challenge holds for %d minutes)",
		gossh.FingerprintSHA256(p.key), int(proofPeriod.Minutes()))
}

func parseSignature(text string) (*sshsig.Signature, error) {
	text = strings.TrimSpace(text)
	if strings.HasPrefix(text, "-----BEGIN") {
		return sshsig.Unarmor([]byte(text))
	}
	b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		return nil, err
	}
	return sshsig.ParseSignature(b)
}
