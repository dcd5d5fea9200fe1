// A matrix in 14 bits a number, by which vectors are multiplied at each token: what is read then decides what a model costs. Products are sums of whole numbers.
#pragma once

#include "linear_math.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

class fate_linear_matrix {
public:
    static const int32_t MOST      = 8191;             // the largest number
    static const int32_t MOST_SUM  = INT32_MAX / MOST; // that a vector's may have, so that no sum overflows
    static const int32_t MOST_ROWS = MOST_SUM / 16;    // so that rounding takes a small part of it
    static const int32_t ALIGN     = 32;               // rows are filled up with zeros to a multiple of so many

    fate_linear_matrix() = default;

    // rows: those of several matrices side by side, each [n_rows][n_columns / n]
    fate_linear_matrix(const std::vector<const float *> & rows, int32_t n_rows, int32_t n_columns) :
        n_rows_(n_rows),
        n_columns_(n_columns),
        stride_((n_rows + ALIGN - 1) / ALIGN * ALIGN),
        numbers_(static_cast<size_t>(n_columns) * stride_),
        row_scale_(n_rows),
        column_scale_(n_columns),
        whole_(stride_),
        scaled_(stride_) {
        const int32_t width = n_columns / static_cast<int32_t>(rows.size());
        const auto    at    = [&](int32_t row, int32_t column) {
            return rows[column / width][static_cast<size_t>(row) * width + column % width];
        };
        for (int32_t row = 0; row < n_rows; ++row) { // first the rows are made alike, then the columns
            for (int32_t column = 0; column < n_columns; ++column) {
                row_scale_[row] = std::max(row_scale_[row], std::fabs(at(row, column)));
            }
            row_scale_[row] = row_scale_[row] > 0 ? row_scale_[row] : 1.0f;
        }
        for (int32_t column = 0; column < n_columns; ++column) {
            float most = 0;
            for (int32_t row = 0; row < n_rows; ++row) {
                most = std::max(most, std::fabs(at(row, column)) / row_scale_[row]);
            }
            column_scale_[column] = most > 0 ? most / MOST : 1.0f;
            for (int32_t row = 0; row < n_rows; ++row) {
                numbers_[static_cast<size_t>(column) * stride_ + row] =
                    static_cast<int16_t>(std::lrint(at(row, column) / row_scale_[row] / column_scale_[column]));
            }
        }
    }

    // sums[n_columns] += vector[n_rows] x matrix
    void add(const fate_linear_math & math, const float * vector, float * sums) {
        const float unit = make_whole(math, vector);
        math.add_dots(numbers_.data(), whole_.data(), stride_, n_columns_, column_scale_.data(), unit, sums);
    }

    // Makes whole() of a vector; returns what its numbers are to be multiplied by.
    float make_whole(const fate_linear_math & math, const float * vector) {
        for (int32_t row = 0; row < n_rows_; ++row) {
            scaled_[row] = vector[row] * row_scale_[row];
        }
        return math.whole(scaled_.data(), stride_, MOST_SUM, whole_.data());
    }

    const std::vector<int16_t> & whole() const { return whole_; }

    const std::vector<int16_t> & numbers() const { return numbers_; } // [n_columns][stride]

    const std::vector<float> & column_scale() const { return column_scale_; }

    int32_t stride() const { return stride_; }

private:
    int32_t              n_rows_ = 0, n_columns_ = 0, stride_ = 0;
    std::vector<int16_t> numbers_; // [n_columns][stride]
    std::vector<float>   row_scale_, column_scale_;
    std::vector<int16_t> whole_;   // scratch
    std::vector<float>   scaled_;  // the same, zeros at the end
};
