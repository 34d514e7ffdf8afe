package vm

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Emulated guests read the host's time stamp counter. A guest kernel that is
// told its frequency need not find it out, which takes most of a second; one
// that is told a wrong frequency finds out all the same, mistrusts the counter
// and uses a slow clock for the rest of its life.

// tscFrequency measures the frequency of the host's counter in kHz. It returns
// 0 when the host does not vouch for the counter, or when measurements never
// agree to one part in 2,000, as on a busy machine.
func tscFrequency() int {
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !hasFlag(string(cpuinfo), "constant_tsc") || !hasFlag(string(cpuinfo), "nonstop_tsc") {
		return 0
	}
	for range 5 {
		var kHz [3]float64
		for i := range kHz {
			start, from := time.Now(), rdtsc()
			time.Sleep(15 * time.Millisecond)
			ticks, passed := rdtsc()-from, time.Since(start)
			kHz[i] = float64(ticks) / (float64(passed) / float64(time.Millisecond))
		}
		if f := agree(kHz[:], 0.0005); f != 0 {
			return f
		}
	}
	return 0
}

// frequencyFile is where in the state directory the frequency is kept.
const frequencyFile = "tsc-khz"

// keptFrequency returns what was measured first, if a new measurement agrees with
// it: the frequency is part of what a template depends on, and no two
// measurements are the same. Else the new one is kept.
func keptFrequency(path string, measured int) (int, error) {
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return measured, fmt.Errorf("recall frequency: %w", err)
	}
	first, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if measured == 0 {
		return 0, nil
	}
	if err == nil && agree([]float64{float64(first), float64(measured)}, 0.0005) != 0 {
		return first, nil
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(measured)+"\n"), 0o644); err != nil {
		return measured, fmt.Errorf("keep frequency: %w", err)
	}
	return measured, nil
}

// agree returns the mean of values that differ by no more than the given part
// of it, 0 otherwise.
func agree(values []float64, part float64) int {
	low, high, sum := values[0], values[0], 0.0
	for _, v := range values {
		low, high, sum = min(low, v), max(high, v), sum+v
	}
	mean := sum / float64(len(values))
	if mean <= 0 || high-low > mean*part {
		return 0
	}
	return int(mean + 0.5)
}

// hasFlag reports whether /proc/cpuinfo lists a flag for the first processor.
func hasFlag(cpuinfo, flag string) bool {
	_, rest, _ := strings.Cut(cpuinfo, "\nflags")
	line, _, _ := strings.Cut(rest, "\n")
	for _, f := range strings.Fields(line) {
		if f == flag {
			return true
		}
	}
	return false
}

// cpuName returns the host's processor model as /proc/cpuinfo tells it: by name,
// or on Arm by numbers.
func cpuName() string {
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	return parseCPUName(string(cpuinfo))
}

func parseCPUName(cpuinfo string) string {
	var words []string
	for _, field := range []string{"model name", "CPU implementer", "CPU part", "CPU variant"} {
		_, rest, _ := strings.Cut(cpuinfo, field)
		line, _, _ := strings.Cut(rest, "\n")
		if value := strings.TrimSpace(strings.TrimLeft(line, "\t :")); value != "" {
			words = append(words, value)
		}
	}
	return strings.Join(words, " ")
}
